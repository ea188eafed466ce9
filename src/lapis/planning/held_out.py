"""What a plan measures with: held-out chats, plain text and questions, as ids that can be run from any layer on.

Hidden states before a changed layer do not change, so they are kept at that layer's input and only the layers from
there on are run. (A model of transformers is run whole each time.) One hidden state per token is held, whatever the
number of layers. What was measured is written to a journal, so that a plan that was killed goes on.

Shapes: B sequences, T places, R scored places, C compared places, D model dim, V vocabulary.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapis.errors import DataError, LapisError, OutputError
from lapis.evaluation.chats import encode_record
from lapis.evaluation.choices import Choice, scored_choices
from lapis.evaluation.text import windows_of
from lapis.model.reading.readable import ReadableModel
from lapis.model.scoring import ScoredSequence, batches_by_length, lay_out, read_logits, token_log_probabilities
from lapis.text.corpus.corpus import ChatRecord
from lapis.text.tokenizer.tokenizer import Tokenizer

BATCH = 4096  # places of one batch
COMPARED = 512  # places of each kind at which whole distributions are compared
TEXT_TOKENS = 128  # of text for each chat

Figures = dict[str, float]

log = logging.getLogger("lapis")


@dataclass(frozen=True)
class HeldOut:
    """chats, text, choices: sequences with the places that are scored. size: bytes of the text. prompts: the chats.
    ends: ids that end a turn."""

    chats: list[ScoredSequence]
    text: list[ScoredSequence] = field(default_factory=list)
    size: int = 0
    choices: list[ScoredSequence] = field(default_factory=list)
    questions: list[Choice] = field(default_factory=list)
    prompts: list[ChatRecord] = field(default_factory=list)
    ends: frozenset[int] = frozenset()

    @property
    def tokens(self) -> dict[str, int]:
        return {kind: sum(len(s.ids) for s in getattr(self, kind)) for kind in ("chats", "text", "choices")}


def make_held_out(
    tokenizer: Tokenizer,
    chats: Iterable[ChatRecord],
    texts: Iterable[str] = (),
    questions: Sequence[Choice] = (),
    *,
    context: int = 256,
    limit: int = 64,
) -> HeldOut:
    """The first `limit` chats, and as much text: TEXT_TOKENS for each, in windows of `context`.

    Raises:
        DataError: No chat has a token of the assistant within `context`.
    """
    sequences: list[ScoredSequence] = []
    prompts: list[ChatRecord] = []
    for chat in chats:
        if len(sequences) == limit:
            break
        ids, scored = encode_record(tokenizer, chat)
        if any(scored[1 : context + 1]):
            sequences.append(ScoredSequence(ids[: context + 1], scored[: context + 1]))
            prompts.append(chat)
    if not sequences:
        raise DataError(f"plan: no chat has an assistant token within its first {context} tokens; give other --chats")
    lead = tokenizer.document_lead
    windows: list[ScoredSequence] = []
    size, room = 0, max(limit * TEXT_TOKENS, 1)
    for text in texts:
        if room <= 0:
            break
        ids = tokenizer.encode(text)[:room]
        read = text if len(ids) < room else tokenizer.decode(ids)
        if ids and lead is not None:
            windows += windows_of([lead, *ids], context)
            size, room = size + len(read.encode()), room - len(ids)
    return HeldOut(
        sequences, windows, size,
        [s for q in questions for s in scored_choices(tokenizer, q, context)], list(questions),
        [chat for chat in prompts if chat.messages[0].get("role") != "assistant"], frozenset(tokenizer.end_ids),
    )  # fmt: skip


@dataclass
class HeldOutBatch:
    """Sequences of like length. x_BTD: their hidden states at the input of the layer that was reached."""

    kind: str
    order: list[int]
    ids_BT: Tensor
    rows_R: Tensor
    places_R: Tensor
    targets_R: Tensor
    ending_R: Tensor  # bool: the target ends a turn
    compared_C: Tensor  # which of the scored places are compared
    x_BTD: Tensor = field(default_factory=lambda: torch.empty(0))
    shared: Any = None
    reference_CD: Tensor | None = None


class PlanJournal:
    """Figures that were measured, one line of JSON each, in a file that a rerun of the same job reads.

    path: None keeps nothing. job: a digest of all that decides the figures; a file of another job is begun anew.
    """

    def __init__(self, path: Path | None = None, job: str = "") -> None:
        self._path = path
        self.lines: dict[str, dict[str, Any]] = {}
        if path is None:
            return
        lines = _lines(path)
        if lines and lines[0] == {"job": job}:
            self.lines = {line["key"]: line for line in lines[1:]}
            os.truncate(path, sum(len(_dump(line)) for line in lines))  # a line that a kill cut in two
        else:
            if lines:
                log.warning("%s: what was measured there was of other models, texts or settings; measured anew", path)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(_dump({"job": job}))
            except OSError as error:
                raise OutputError(f"{path}: cannot be written: {error.strerror}; give another --out") from None

    def add(self, key: str, figures: Any, passes: float) -> None:
        line = {"key": key, "figures": figures, "passes": passes}
        self.lines[key] = line
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(_dump(line))

    def __enter__(self) -> "PlanJournal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The job is done, or was refused, as the same call would be again: its journal goes."""
        if self._path is not None and (kind is None or issubclass(kind, LapisError)):
            self._path.unlink(missing_ok=True)


class Runner:
    """Runs held-out material on a model, whole or from a layer on, and remembers what was measured.

    passes: forward passes over all of the material so far; a backward pass counts as two. watch: called with the
    passes after each measurement.
    """

    def __init__(
        self,
        model: ReadableModel,
        held_out: HeldOut,
        journal: PlanJournal | None = None,
        watch: Callable[[float], None] | None = None,
    ) -> None:
        self.model, self.held_out = model, held_out
        self.batches = [b for kind in ("chats", "text", "choices") for b in _batches(kind, held_out)]
        self.passes = 0.0
        self.journal = journal or PlanJournal()
        self._watch = watch or (lambda passes: None)

    def recorded(self, key: str, measure: Callable[[], Any]) -> Any:
        """What `measure` gives, JSON; or what it gave before, where the journal holds that."""
        if (line := self.journal.lines.get(key)) is not None:
            self.spend(float(line["passes"]))
            return line["figures"]
        before = self.passes
        figures = measure()
        self.journal.add(key, figures, self.passes - before)
        return figures

    def spend(self, passes: float) -> None:
        """Counts forward passes, and tells how far the plan is."""
        self.passes += passes
        self._watch(self.passes)

    @torch.no_grad()
    def start(self) -> None:
        """Hidden states at the input of layer 0."""
        for batch in self.batches:
            batch.x_BTD, batch.shared = self.model.start(batch.ids_BT)

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """From the input of `layer` to that of the next; nothing for a model that is not entered between its layers."""
        for block in self.model.blocks[layer : layer + 1]:
            for batch in self.batches:
                batch.x_BTD = block(batch.x_BTD, batch.shared)
            self.spend(1 / len(self.model.blocks))

    @torch.no_grad()
    def score(self, layer: int = 0, *, keep: bool = False) -> Figures:
        """The figures of the model as it stands, from the input of `layer` on.

        Args:
            layer: The first one that is run; the layers below are as they were when `advance` passed them.
            keep: Later calls compare their distributions with those of this one.

        Returns:
            response_nll (nats per token), stop (mean probability of the end token where a reply ends), bits_per_byte,
            right_nll (nats of a right choice), accuracy, kl_chats and kl_text (nats per token, from the distributions
            that the last call with keep=True saw to these).
        """
        totals: dict[str, list[float]] = {}
        nats: dict[int, float] = {}
        for batch in self.batches:
            y_BTD = batch.x_BTD
            for block in self.model.blocks[layer:]:
                y_BTD = block(y_BTD, batch.shared)
            hidden_RD = self.model.end(y_BTD)[batch.rows_R, batch.places_R]
            nll_R = -token_log_probabilities(self.model, hidden_RD, batch.targets_R)
            _add(totals, batch.kind, float(nll_R.double().sum()), len(nll_R))
            if batch.kind == "chats" and bool(batch.ending_R.any()):
                _add(totals, "stop", float((-nll_R[batch.ending_R]).exp().sum()), int(batch.ending_R.sum()))
            if batch.kind == "choices":
                sums_B = torch.zeros(len(batch.order), dtype=torch.float64).index_add_(0, batch.rows_R, nll_R.double())
                nats |= dict(zip(batch.order, sums_B.tolist(), strict=True))
            compared_CD = hidden_RD[batch.compared_C]
            if keep:
                batch.reference_CD = compared_CD.clone()
            if batch.reference_CD is not None and batch.kind != "choices":
                _add(totals, f"kl_{batch.kind}", self._kl(batch.reference_CD, compared_CD), len(compared_CD))
        self.spend(1 - layer / len(self.model.blocks) if self.model.blocks else 1)
        return self._figures(totals, nats)

    def _kl(self, reference_CD: Tensor, hidden_CD: Tensor) -> float:
        """Kullback-Leibler divergence of the model's distributions from the reference's, summed, nats."""

        def divergence(logits_CV: Tensor, reference_CD: Tensor) -> tuple[Tensor]:
            old = self.model.head(reference_CD).float().log_softmax(-1)
            return ((old.exp() * (old - logits_CV.log_softmax(-1))).sum(-1),)

        (values_C,) = read_logits(self.model, divergence, hidden_CD, reference_CD)
        return float(values_C.sum())

    def _figures(self, totals: dict[str, list[float]], nats: dict[int, float]) -> Figures:
        figures = {"response_nll": _mean(totals, "chats")}
        if "stop" in totals:
            figures["stop"] = _mean(totals, "stop")
        if "text" in totals:
            figures["bits_per_byte"] = totals["text"][0] / math.log(2) / self.held_out.size
        figures |= {key: _mean(totals, key) for key in ("kl_chats", "kl_text") if key in totals}
        if nats:
            at, right, answer = 0, 0, 0.0
            for question in self.held_out.questions:
                costs = [nats[at + i] for i in range(len(question.choices))]
                at += len(costs)
                right += costs.index(min(costs)) == question.answer
                answer += costs[question.answer]
            count = len(self.held_out.questions)
            figures |= {"accuracy": right / count, "right_nll": answer / count}
        return figures


def _add(totals: dict[str, list[float]], key: str, value: float, count: int) -> None:
    entry = totals.setdefault(key, [0.0, 0])
    entry[0] += value
    entry[1] += count


def _mean(totals: dict[str, list[float]], key: str) -> float:
    return totals[key][0] / max(totals[key][1], 1)


def _batches(kind: str, held_out: HeldOut) -> Iterable[HeldOutBatch]:
    sequences: list[ScoredSequence] = getattr(held_out, kind)
    scored = sum(sum(sequence.scored[1:]) for sequence in sequences)
    step = max(1, scored // COMPARED)
    ends = torch.tensor(sorted(held_out.ends), dtype=torch.int64)
    for numbers in batches_by_length([len(sequence.ids) for sequence in sequences], BATCH):
        rows = lay_out([sequences[i] for i in numbers])
        yield HeldOutBatch(
            kind,
            numbers,
            ids_BT=rows.ids_BT[:, :-1],  # the last place of a row predicts nothing
            rows_R=rows.rows_R,
            places_R=rows.places_R,
            targets_R=rows.targets_R,
            ending_R=torch.isin(rows.targets_R, ends),
            compared_C=torch.arange(0, len(rows.targets_R), step),
        )


def _dump(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal, up to the first that is none."""

    def parsed(raw: bytes) -> Any:
        try:
            return json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            return None

    try:
        with path.open("rb") as file:
            return list(takewhile(lambda line: isinstance(line, dict), map(parsed, file)))
    except OSError:
        return []
