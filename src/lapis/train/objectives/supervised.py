"""Next-token prediction on packed rows: on every token of texts (Causal), or on what the assistant says (Chat).

The head runs only on the places that carry loss, which in chats are few. Rows hold several documents; segments keep
them apart, so the loss is what it would be for each document alone. Leaves out: masked, classify, preferences.

Shapes: B rows, T places, R places with loss, D model dim.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lapis.errors import DataError, LapisError
from lapis.generate import Sampling, generate
from lapis.model.heads import LanguageHead, MaskedHead
from lapis.model.transformer import Transformer
from lapis.text.corpus import Chat as ChatRecord
from lapis.text.corpus import Document
from lapis.text.packing import pack
from lapis.text.rows import IGNORE, Cursor, RowBatch, Rows
from lapis.text.tokenizer import Tokenizer
from lapis.train.cross_entropy import head_cross_entropy
from lapis.train.state import TrainState

Files = str | Path | Iterable[str | Path]


class Causal:
    """Continued text: every token of every document, and its end.

    data: files or folders of text, documents, or rows that are packed already. context: tokens of a row.
    """

    def __init__(self, tokenizer: Tokenizer, data: Files | Iterable[Document] | Rows, context: int = 512) -> None:
        self.tokenizer = tokenizer
        self.data = _packed(tokenizer, data, context, "documents", "cut")
        self.rows = len(self.data)

    def describe(self) -> dict[str, Any]:
        return _described("causal", self.tokenizer, self.data)

    def batches(self, state: TrainState) -> Iterator[tuple[RowBatch, dict[str, Any]]]:
        return _batches(self.data, state)

    def prepare(self, model: Transformer, batch: RowBatch) -> RowBatch:
        return batch.to(next(model.parameters()).device)

    def loss(self, model: Transformer, batch: RowBatch) -> tuple[Tensor, int, dict[str, float]]:
        total, count = next_token_loss(model, batch)
        return total, count, {"tokens": batch.ids_BT.numel(), "bytes": count * self.data.bytes_per_token}

    def sample(self, model: Transformer) -> str:
        return _continued(model, self.tokenizer, "")


class Chat:
    """Instruction tuning: the assistant's tokens and its end token, in every turn.

    data: .jsonl files of chats, chats, or rows that are packed already. context: tokens of a row. too_long: a chat that
    is longer than a row is cut at its end, or dropped; both are counted.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Files | Iterable[ChatRecord] | Rows,
        context: int = 512,
        too_long: Literal["cut", "drop"] = "cut",
    ) -> None:
        self.tokenizer = tokenizer
        self.data = _packed(tokenizer, data, context, "chats", too_long)
        self.rows = len(self.data)

    def describe(self) -> dict[str, Any]:
        return _described("chat", self.tokenizer, self.data)

    def batches(self, state: TrainState) -> Iterator[tuple[RowBatch, dict[str, Any]]]:
        return _batches(self.data, state)

    def prepare(self, model: Transformer, batch: RowBatch) -> RowBatch:
        return batch.to(next(model.parameters()).device)

    def loss(self, model: Transformer, batch: RowBatch) -> tuple[Tensor, int, dict[str, float]]:
        total, count = next_token_loss(model, batch)
        return total, count, {"tokens": batch.ids_BT.numel()}

    def sample(self, model: Transformer) -> str:
        """What the model replies to the first chat of the data."""
        batch, _ = self.data.batch(Cursor(), 1)
        supervised = (batch.targets_BT[0] != IGNORE).nonzero()
        prompt = batch.ids_BT[0, : int(supervised[0]) + 1].tolist()
        return f"{self.tokenizer.decode(prompt, True)} -> {_continued(model, self.tokenizer, prompt)}"


def next_token_loss(model: Transformer, batch: RowBatch) -> tuple[Tensor, int]:
    """Summed cross entropy in nats, and over how many tokens."""
    positions, segments = batch.positions_BT, batch.segments_BT
    if bool((segments == segments[:, :1]).all()):  # one document in each row: the causal mask says it all
        hidden_BTD = model.hidden(batch.ids_BT)
    else:
        hidden_BTD = model.hidden(batch.ids_BT, positions_BT=positions, segments_BT=segments)
    targets = batch.targets_BT.flatten()
    hidden = hidden_BTD.flatten(0, 1)
    places_R = (targets != IGNORE).nonzero()[:, 0]
    if len(places_R) < len(targets):
        hidden, targets = hidden.index_select(0, places_R), targets.index_select(0, places_R)
    return summed_cross_entropy(model, hidden, targets), len(targets)


def summed_cross_entropy(model: Transformer, hidden_RD: Tensor, targets_R: Tensor) -> Tensor:
    """Nats, summed. The plain head is run block by block; any other as it is."""
    head = model.head
    if isinstance(head, LanguageHead) and not isinstance(head, MaskedHead):
        return head_cross_entropy(hidden_RD, head.matrix, targets_R, head.bias)
    return F.cross_entropy(head(hidden_RD).float(), targets_R, reduction="sum")


def _packed(tokenizer: Tokenizer, data: Any, context: int, kind: str, too_long: Literal["cut", "drop"]) -> Rows:
    rows = data if isinstance(data, Rows) else _opened(data) or pack(data, tokenizer, None, context, too_long=too_long)
    if rows.chats != (kind == "chats"):
        raise DataError(f"{rows.source}: holds {rows.info['kind']}; this objective learns from {kind}")
    if rows.info["tokenizer"] != tokenizer.digest():
        raise DataError(f"{rows.source}: was packed with another tokenizer; pack the data again")
    return rows


def _opened(data: Any) -> Rows | None:
    """A folder that `lapis data pack` made."""
    if isinstance(data, (str, Path)) and (Path(data) / "rows.json").is_file():
        return Rows.open(data)
    return None


def _described(objective: str, tokenizer: Tokenizer, rows: Rows) -> dict[str, Any]:
    return {
        "objective": objective,
        "data": rows.digest,
        "counts": {"rows": len(rows), **rows.counts},
        "context": rows.length,
        "tokenizer": tokenizer.digest(),
    }


def _batches(rows: Rows, state: TrainState) -> Iterator[tuple[RowBatch, dict[str, Any]]]:
    cursor = Cursor(seed=state.seed) if state.cursor is None else Cursor.from_json(state.cursor)
    while True:
        batch, cursor = rows.batch(cursor, state.rows)
        yield batch, cursor.to_json()


def _continued(model: Transformer, tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    """Forty tokens, or what stood in the way."""
    try:
        with torch.inference_mode():
            return generate(model, tokenizer, prompt, Sampling(temperature=0.7, top_p=0.9, max_tokens=40, seed=0))
    except LapisError as error:
        return f"({error})"
