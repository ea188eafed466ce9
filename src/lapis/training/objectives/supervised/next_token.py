"""Next-token prediction on packed rows: on every token of texts (Causal), or on what the assistant says (Chat).

The head runs only on the places that carry loss, which in chats are few. Rows hold several documents; segments keep
them apart, so the loss is what it would be for each document alone. Leaves out: masked, classify, preferences.

Shapes: B rows, T places, R places with loss, D model dim.
"""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from lapis.errors import LapisError
from lapis.generation.generate import generate
from lapis.generation.options import Sampling
from lapis.model.heads import LanguageHead, MaskedHead
from lapis.model.transformer import Transformer
from lapis.text.corpus.corpus import Chat as ChatRecord
from lapis.text.corpus.corpus import Document
from lapis.text.rows.coverage import lines
from lapis.text.rows.data_sources import Wanted, open_data
from lapis.text.rows.mixture import Data, Draw, Mixture, draws
from lapis.text.rows.packing import Report
from lapis.text.rows.rows import IGNORE, RowBatch
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.loop.state import TrainState
from lapis.training.objectives.supervised.cross_entropy import head_cross_entropy

Files = str | Path | Sequence[str | Path]
Weights = Mapping[str, float] | Sequence[Mapping[str, Any]]


class Causal:
    """Continued text: every token of every document, and its end.

    data: files or folders of text, documents, rows that are packed already, or several of these by weights: {place:
    weight} or a list of {path, weight} (rows/data_sources.py). context: tokens of a row. field: what holds the text in
    a record, where it is not plain. workers: processes that pack large files, 0 = one for each processor.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Files | Weights | Iterable[Document] | Data,
        *,
        context: int = 512,
        field: str | None = None,
        workers: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        with _progress() as report:
            self.data = open_data(data, Wanted(tokenizer, "documents", context, "cut", field, workers, report))
        self.rows = len(self.data)

    def describe(self) -> dict[str, Any]:
        return _described("causal", self.tokenizer, self.data)

    def coverage(self) -> list[str]:
        """What of the data carries loss, in lines to be read before a run starts."""
        return lines(self.data)

    def batches(self, state: TrainState) -> Iterator[tuple[Draw, dict[str, Any]]]:
        return draws(self.data, state.rows, state.seed, state.cursor)

    def prepare(self, model: Transformer, batch: Draw | RowBatch) -> RowBatch:
        return batch.to(next(model.parameters()).device)

    def loss(self, model: Transformer, batch: RowBatch) -> tuple[Tensor, int, dict[str, float]]:
        total, count = next_token_loss(model, batch)
        return total, count, {"tokens": batch.ids_BT.numel(), "bytes": count * self.data.bytes_per_token}

    def sample(self, model: Transformer) -> str:
        return _continued(model, self.tokenizer, "")


class Chat:
    """Instruction tuning: the assistant's tokens and its end token, in every turn.

    data: files of chats, chats, rows that are packed already, or several of these by weights, as for Causal. context:
    tokens of a row. too_long: a chat that is longer than a row is cut at its end, or dropped; both are counted. field:
    what holds the messages in a record, where it is not plain. workers: processes that pack large files.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Files | Weights | Iterable[ChatRecord] | Data,
        *,
        context: int = 512,
        too_long: Literal["cut", "drop"] = "cut",
        field: str | None = None,
        workers: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        with _progress() as report:
            self.data = open_data(data, Wanted(tokenizer, "chats", context, too_long, field, workers, report))
        self.rows = len(self.data)

    def describe(self) -> dict[str, Any]:
        return _described("chat", self.tokenizer, self.data)

    def coverage(self) -> list[str]:
        """What of the data carries loss, in lines to be read before a run starts."""
        return lines(self.data)

    def batches(self, state: TrainState) -> Iterator[tuple[Draw, dict[str, Any]]]:
        return draws(self.data, state.rows, state.seed, state.cursor)

    def prepare(self, model: Transformer, batch: Draw | RowBatch) -> RowBatch:
        return batch.to(next(model.parameters()).device)

    def loss(self, model: Transformer, batch: RowBatch) -> tuple[Tensor, int, dict[str, float]]:
        total, count = next_token_loss(model, batch)
        return total, count, {"tokens": batch.ids_BT.numel()}

    def sample(self, model: Transformer) -> str:
        """What the model replies to the first chat of the data."""
        batch, _ = next(draws(self.data, 1, 0, None))
        first = batch.to("cpu")
        supervised = (first.targets_BT[0] != IGNORE).nonzero()
        prompt = first.ids_BT[0, : int(supervised[0]) + 1].tolist()
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


def _described(objective: str, tokenizer: Tokenizer, data: Data) -> dict[str, Any]:
    return {
        "objective": objective,
        "data": data.facts if isinstance(data, Mixture) else data.digest,
        "counts": {"rows": len(data), **data.counts},
        "context": data.length,
        "tokenizer": tokenizer.digest(),
    }


@contextmanager
def _progress() -> Iterator[Report | None]:
    """A line that says how far packing is, where somebody looks."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield None
        return
    with Console(stderr=True).status("reading data") as status:
        yield lambda texts, tokens: status.update(f"packing: {texts:,} texts, {tokens:,} tokens")


def _continued(model: Transformer, tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    """Forty tokens, or what stood in the way."""
    try:
        with torch.inference_mode():
            return generate(model, tokenizer, prompt, Sampling(temperature=0.7, top_p=0.9, max_tokens=40, seed=0))
    except LapisError as error:
        return f"({error})"
