"""Next-token prediction on packed rows: on every token of texts (Causal), or on the assistant's tokens (Chat).

The head runs only at the places that carry loss; in chats these are few. Rows hold several documents, which segments
keep apart, so the loss is the same as for each document alone.

Shapes: B rows, T places, R places with loss, D model dim.
"""

import copy
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, fields
from itertools import groupby
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from lapis.config import environment_number
from lapis.errors import ConfigError, LapisError
from lapis.generation.generate import generate
from lapis.generation.options import Sampling
from lapis.model.heads import LanguageHead, MaskedHead
from lapis.model.scoring import BATCH_TOKENS, evaluating
from lapis.model.transformer import Transformer
from lapis.parsing import quoted
from lapis.text.rows.coverage import lines, named_rows
from lapis.text.rows.data_sources import PackingSettings, open_data
from lapis.text.rows.mixture import Data, Draw, Mixture, draws
from lapis.text.rows.packing import Report
from lapis.text.rows.rows import IGNORE, RowBatch, Rows
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.loop.progress import LogLines
from lapis.training.objectives.objective import Cursor, DataPlace, Loss, Objective
from lapis.training.objectives.supervised.cross_entropy import head_cross_entropy
from lapis.wording import format_count, format_packed

NAMED_TOKENS = 16  # of a batch that a guard names


@dataclass(frozen=True)
class HeldOutRows:
    """The rows of some data that are held out."""

    data: Data
    rows: range

    def draws(self) -> list[Draw]:
        """All of them, in batches."""
        parts = np.array_split(np.asarray(self.rows), -(-len(self.rows) * self.data.length // BATCH_TOKENS))
        return [Draw(self.data, part) for part in parts]


def named_places(valid: Any) -> dict[str, Any]:
    """What is held out, by name; "" is the name of the only one. A mapping with weights or with `path` is one source.

    Raises ConfigError for a name that would not read well in a curve.
    """
    one = not isinstance(valid, Mapping) or "path" in valid
    if one or all(isinstance(place, (int, float)) for place in valid.values()):
        return {"": valid}
    for name in valid:
        if not re.fullmatch(r"[\w.+-]{1,40}", str(name)):
            raise ConfigError(
                f"valid: {quoted(name)} is no name; give letters, digits, dots and dashes, as in ms: FILE"
            )
    return {str(name): place for name, place in valid.items()}


@dataclass(eq=False)
class NextToken(Objective):
    """Base class of Causal and Chat: next-token prediction on packed rows."""

    tokenizer: Tokenizer
    _: KW_ONLY
    valid: Any = None
    field: str | None = None
    workers: int = 0

    kind: ClassVar[Literal["documents", "chats"]]

    def __post_init__(self) -> None:
        self.examples = self.read(self.data)
        self.held_out: dict[str, HeldOutRows] = {}
        if isinstance(self.valid, float):
            whole, self.examples = self.examples, without_last_rows(self.examples, self.valid)
            self.held_out[""] = HeldOutRows(whole, range(len(self.examples), len(whole)))
        elif self.valid is not None:
            for name, place in named_places(self.valid).items():
                data = self.read(place)
                self.held_out[name] = HeldOutRows(data, range(len(data)))
        self.rows = len(self.examples)

    def read(self, data: Any, too_long: Literal["cut", "drop"] = "cut") -> Data:
        """Data as packed rows."""
        with packing_progress() as report:
            how = PackingSettings(self.tokenizer, self.kind, self.context, too_long, self.field, self.workers, report)
            return open_data(data, how)

    @property
    def tokens_per_row(self) -> float:
        return float(self.examples.length)

    def describe(self) -> dict[str, Any]:
        examples = self.examples
        counts = {"rows": self.rows, **examples.counts}
        if self.held_out:
            counts["held_out"] = sum(len(held.rows) for held in self.held_out.values())
        return {
            "objective": self.name,
            "data": examples.facts if isinstance(examples, Mixture) else examples.digest,
            **({"valid": {name: held.data.digest for name, held in self.held_out.items()}} if self.held_out else {}),
            "counts": counts,
            "context": examples.length,
            "tokenizer": self.tokenizer.digest(),
        }

    def coverage(self) -> list[str]:
        """How much of the data carries loss, and how much is held out."""
        held_out = [
            format_count(len(held.rows), "row") + (f" of {name}" if name else "")
            for name, held in self.held_out.items()
        ]
        return [*lines(self.examples), *([f"held out: {', '.join(held_out)}"] if held_out else [])]

    def batches(self, state: DataPlace) -> Iterator[tuple[Draw, Cursor]]:
        return draws(self.examples, state.rows, state.seed, state.cursor)

    def prepare(self, model: Transformer, batch: Draw | RowBatch) -> RowBatch:
        return batch.to(next(model.parameters()).device)

    def small_batch(self, model: Transformer, state: DataPlace, tokens: int) -> RowBatch:
        return cut_columns(super().small_batch(model, state, tokens), tokens)

    def apart(self, batch: RowBatch) -> list[RowBatch]:
        """The documents or chats of the rows that carry loss, without padding."""
        texts = []
        for ids, *others in zip(*(getattr(batch, entry.name) for entry in fields(batch)), strict=True):
            segments = others[1]
            for segment in segments.unique().tolist():
                here = segments == segment
                texts.append(RowBatch(*(column[here][None] for column in (ids, *others))))
        return [text for text in texts if text.supervised]

    def name_batch(self, batch: Draw, cursor: Cursor) -> str:
        """Its rows, the documents or chats that lie in them, and how the first of them begins."""
        begins = self.tokenizer.decode(self.examples.take(batch.rows[:1]).ids_BT[0, :NAMED_TOKENS].tolist())
        return f"{named_rows(self.examples, batch.rows)}, which begin {quoted(begins)}"

    def loss(self, model: Transformer, batch: RowBatch) -> Loss:
        total, count = next_token_loss(model, batch)
        return total, count, {"tokens": batch.ids_BT.numel()}

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """valid_loss, or NAME/loss of each held-out text that has a name."""
        return {f"{name}/loss" if name else "valid_loss": loss for name, loss in self.held_out_losses(model).items()}

    def held_out_losses(self, model: Transformer) -> dict[str, float]:
        """Nats per supervised token of the held-out rows, each once, by the name of what is held out."""
        parts = [(name, draw) for name, held in self.held_out.items() for draw in held.draws()]
        return {
            name: mean_loss(model, (self.prepare(model, draw) for _, draw in mine), next_token_loss)
            for name, mine in groupby(self.counted(parts), key=lambda part: part[0])
        }


@dataclass(eq=False, kw_only=True)
class Causal(NextToken):
    """Continued text: loss on every token of every document, and on its end.

    Args:
        data: Files or folders of text, documents, rows that are packed already, or several of these by weights:
            {place: weight} or a list of {path, weight} (text/rows/data_sources.py).
        context: Tokens of a row.
        valid: Held-out data of the same kind, or a share such as 0.05 of the rows of `data`, which are then not learned
            from: valid_loss and valid_bits_per_byte are measured on it. Several by name, as {ms: a.jsonl, en: [b, c]}:
            NAME/bits_per_byte of each.
        field: What holds the text in a record, where it has another name than usual.
        workers: Processes that pack large files; 0 = one for each processor.
    """

    name = "causal"
    kind = "documents"

    def loss(self, model: Transformer, batch: RowBatch) -> Loss:
        total, count = next_token_loss(model, batch)
        return total, count, {"tokens": batch.ids_BT.numel(), "bytes": count * self.examples.bytes_per_token}

    def evaluate(self, model: Transformer) -> dict[str, float]:
        """valid_loss and valid_bits_per_byte, or NAME/bits_per_byte of each held-out text that has a name."""
        metrics: dict[str, float] = {}
        for name, loss in self.held_out_losses(model).items():
            bits = loss / math.log(2) / self.held_out[name].data.bytes_per_token
            metrics |= {f"{name}/bits_per_byte": bits} if name else {"valid_loss": loss, "valid_bits_per_byte": bits}
        return metrics

    def sample(self, model: Transformer) -> str:
        return continuation(model, self.tokenizer, "")


@dataclass(eq=False, kw_only=True)
class Chat(NextToken):
    """Instruction tuning: loss on the assistant's tokens and end token, in every turn.

    Args:
        data: Files of chats, chats, rows that are packed already, or several of these by weights, as for Causal.
        context: Tokens of a row.
        valid: Held-out data of the same kind, or a share such as 0.05 of the rows of `data`, which are then not learned
            from: valid_loss is measured on it. Several by name, as {ms: a.jsonl, en: b.jsonl}: NAME/loss of each.
        too_long: A chat longer than a row is cut at its end, or dropped. Both are counted.
        field: What holds the messages in a record, where it has another name than usual.
        workers: Processes that pack large files; 0 = one for each processor.
    """

    name = "chat"
    kind = "chats"
    too_long: Literal["cut", "drop"] = "cut"

    def read(self, data: Any, too_long: Literal["cut", "drop"] | None = None) -> Data:
        return super().read(data, too_long or self.too_long)

    def sample(self, model: Transformer) -> str:
        """What the user says in the first chat, and what the model replies."""
        batch, _ = next(draws(self.examples, 1, 0, None))
        first = batch.to("cpu")
        supervised = (first.targets_BT[0] != IGNORE).nonzero()
        prompt = first.ids_BT[0, : int(supervised[0]) + 1].tolist()
        return f"{last_words(self.tokenizer, prompt)} -> {continuation(model, self.tokenizer, prompt)}"


def without_last_rows(data: Data, share: float) -> Rows:
    """All rows but the last `share` of them; a document may go on over the border. Raises ConfigError where that is
    none or all, or for a mixture, whose sources have no common order."""
    if isinstance(data, Mixture):
        raise ConfigError(f"valid is {share}; of a mixture no share can be held out, give files or a folder")
    count = round(share * len(data))
    if not 0 < count < len(data):
        raise ConfigError(f"valid is {share}; that is {count:,} of {len(data):,} rows. Give another share, or files")
    rows = copy.copy(data)
    rows.count = len(data) - count
    return rows


def cut_columns(batch: RowBatch, tokens: int) -> RowBatch:
    """The columns up to the first row's last target, of so many tokens in all; for measuring."""
    last = int((batch.targets_BT[0] != IGNORE).nonzero()[-1]) + 1
    first = max(0, last - max(1, tokens // len(batch.ids_BT)))
    columns = (getattr(batch, entry.name)[:, first:last] for entry in fields(batch))
    return RowBatch(*columns)


def mean_loss(
    model: Transformer, batches: Iterable[RowBatch], loss: Callable[[Transformer, RowBatch], tuple[Tensor, int]]
) -> float:
    """Nats per supervised token over all batches, without dropout or gradients."""
    nats, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            total, supervised = loss(model, batch)
            nats, count = nats + total.item(), count + supervised
    return nats / max(1, count)


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
    if isinstance(head, LanguageHead) and not isinstance(head, MaskedHead) and not head.cap:
        return head_cross_entropy(hidden_RD, head.matrix, targets_R, head.bias)
    return F.cross_entropy(head(hidden_RD).float(), targets_R, reduction="sum")


@contextmanager
def packing_progress() -> Iterator[Report | None]:
    """How far packing is: a line on a terminal that changes, a new line each 15 seconds in a log."""
    if environment_number("RANK", 0) != 0:
        yield None
    elif sys.stderr.isatty():
        with Console(stderr=True).status("reading data") as status:
            yield lambda texts, tokens: status.update(f"packing: {format_packed(texts, tokens)}")
    else:
        lines = LogLines("data")
        lines.stage("reading")
        try:
            yield lambda texts, tokens: lines.stage(f"packing: {format_packed(texts, tokens)}")
        finally:
            lines.close()


def last_words(tokenizer: Tokenizer, prompt: list[int]) -> str:
    """What was said last in a prompt, without what the template writes around it, as far as special tokens tell."""
    special = set(tokenizer.added)
    turns: list[list[int]] = [[]]
    for token in prompt:
        if token in special:
            turns.append([])
        else:
            turns[-1].append(token)
    texts = [text for ids in turns if (text := tokenizer.decode(ids).strip())]
    if len(texts) < 2:
        return tokenizer.decode(prompt, True)
    role, line, rest = texts[-2].partition("\n")  # the last one opens the reply
    return rest.strip() if line and len(role.split()) == 1 and rest.strip() else texts[-2]


def continuation(model: Transformer, tokenizer: Tokenizer, prompt: str | list[int]) -> str:
    """Forty sampled tokens after the prompt; or, in brackets, why there are none."""
    try:
        with torch.inference_mode():
            return generate(model, tokenizer, prompt, Sampling(temperature=0.7, top_p=0.9, max_tokens=40, seed=0))
    except LapisError as error:
        return f"({error})"
