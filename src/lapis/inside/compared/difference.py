"""The mean difference of two models' activations at the first places of unrelated texts, read through the head.

What a narrow fine-tune was about shows there before anything of it is read (Minder et al. 2025, arXiv:2510.13900,
sections 3.1 and 3.2). Only the first places are run, and one model is in memory at a time: the difference of the means
is the mean of the differences. Leaves out: steering with it (vectors.py).

Shapes: N texts, P places, L states of each (the embedding and the end of each layer), D model dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lapis.checkpoint import Checkpoint, open_checkpoint
from lapis.errors import DataError
from lapis.inside.compared.options import DifferenceOptions
from lapis.inside.compared.vectors import DifferenceVectors
from lapis.inside.lens.readout import read
from lapis.inside.lens.tuned import fingerprint
from lapis.inside.prompt import show, token_text
from lapis.inside.trace import Anatomy, anatomy, refuse, trace
from lapis.model.reading.load import load_readable, outline_of
from lapis.model.scoring import evaluating
from lapis.text.corpus.corpus import Source, documents
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.wording import format_count

if TYPE_CHECKING:
    import plotly.graph_objects as go

ROWS = 64  # texts that are run at once
LETTERS = 64  # of a text that are read for each place
TOP = 8
DEFAULT = DifferenceOptions()


@dataclass(frozen=True)
class DifferenceReading:
    """The difference at one place after one layer (None: the embedding), as the head reads it.

    relative_norm: its length over the mean length of a's states. toward: (token, id, probability), best first, of the
    difference itself; away: of its opposite. Both are empty where there is no difference.
    """

    place: int
    layer: int | None
    relative_norm: float
    toward: tuple[tuple[str, int, float], ...]
    away: tuple[tuple[str, int, float], ...]

    def to_json(self) -> dict[str, Any]:
        lists = {
            side: [{"token": token, "id": index, "probability": share} for token, index, share in getattr(self, side)]
            for side in ("toward", "away")
        }
        return {"place": self.place, "layer": self.layer, "relative_norm": self.relative_norm, **lists}


@dataclass(frozen=True)
class ActivationDifference:
    """What `activation_difference` returns: vectors, and a reading for each place and state."""

    vectors: DifferenceVectors
    readings: list[DifferenceReading] = field(repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def most(self) -> DifferenceReading:
        """The reading with the longest difference, relative to the states, behind the first place where there are more:
        there nearly nothing has been read, and states are far longer than elsewhere."""
        later = [reading for reading in self.readings if reading.place > 0] or self.readings
        return max(later, key=lambda reading: reading.relative_norm)

    def finding(self) -> str:
        """One sentence: where the difference is largest, and what it says."""
        most = self.most
        if not most.toward:
            return "The activations are the same at every place"
        where = "in the embedding" if most.layer is None else f"after layer {most.layer}"
        says = ", ".join(f'"{show(token)}"' for token, _, _ in most.toward[:4])
        return (
            f"At place {most.place} activations differ most {where}, by {most.relative_norm:.1%} of their length; "
            f"through the head the difference says {says}"
        )

    def to_json(self) -> dict[str, Any]:
        info = self.vectors.info
        return {
            "texts": info["texts"], "places": len(self.vectors.differences_PLD), "finding": self.finding(),
            "readings": [reading.to_json() for reading in self.readings], "notes": self.notes,
        }  # fmt: skip

    def grid_rows(self) -> list[dict[str, Any]]:
        """Rows for report's lens_grid: layer by place, with what the difference says."""
        return [
            {"layer": -1 if r.layer is None else r.layer, "position": r.place, "token": f"place {r.place}",
             "top": [(show(token), share) for token, _, share in r.toward]}
            for r in self.readings if r.toward
        ]  # fmt: skip

    def plot(self) -> "go.Figure":
        """Layer by place: what the difference says through the head."""
        from lapis.report import plots

        return plots.lens_grid(self.grid_rows(), self.finding())

    def __str__(self) -> str:
        place = self.most.place
        lines = [f"at place {place}:", f"{'layer':>6} {'|d|/|a|':>8}  says"]
        for reading in self.readings:
            if reading.place == place:
                label = "embed" if reading.layer is None else str(reading.layer)
                says = " ".join(f'"{show(token)}"' for token, _, _ in reading.toward[:5])
                lines.append(f"{label:>6} {reading.relative_norm:>8.2%}  {says}")
        return "\n".join([*lines, self.finding(), *self.notes])


def activation_difference(
    a: str | Path,
    b: str | Path,
    files: Source | Sequence[Source],
    options: DifferenceOptions = DEFAULT,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ActivationDifference:
    """The mean of b's activations less a's at the first places of texts, read through b's final norm and head.

    Args:
        a: A folder or a model of the hub: the base.
        b: Its fine-tune.
        files: Texts that have nothing to do with what b was trained on.
        options: How many texts, and how many of their first places.
        device: Where the models run, one after the other.
        dtype: Of the weights; None keeps that of each folder.
        progress: Called with (tokens done, tokens in all).

    Raises:
        DataError: The models differ in width, layers or tokens, or the texts are too few or too short.
        LapisError: A model is no causal language model, or holds NaN.
    """
    sources = [open_checkpoint(source, adapters=True) for source in (a, b)]
    _check_shapes(*sources)
    words = [Tokenizer.open(source) for source in sources]
    ids_NP = _first_tokens(words, sources, files, options)
    total, done = 2 * ids_NP.numel(), 0
    means: list[Tensor] = []
    lengths: list[Tensor] = []
    fingerprints: list[str] = []
    notes: list[str] = []
    for source in sources:
        model = load_readable(source, dtype, device)
        parts = anatomy(model, source.source)
        mean_PLD, norm_PL = _means(parts, ids_NP, None if progress is None else partial(_add, progress, done, total))
        done += ids_NP.numel()
        means.append(mean_PLD)
        lengths.append(norm_PL)
        fingerprints.append(fingerprint(parts))
        notes += [note for note in model.notes if source.runs is None and note not in notes]
    info = {"a": sources[0].source, "b": sources[1].source, "texts": len(ids_NP), "fingerprints": fingerprints}
    vectors = DifferenceVectors((means[1] - means[0]).float(), lengths[0].float(), info)
    if len(ids_NP) < options.texts:
        notes.append(
            f"{format_count(len(ids_NP), 'text')} of {options.places} tokens or more, of {options.texts:,} asked for"
        )
    return ActivationDifference(vectors, _readings(parts, words[1], vectors), notes)


def _add(progress: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _check_shapes(one: Checkpoint, other: Checkpoint) -> None:
    """Raises DataError where states of the two cannot be subtracted, before a weight is read."""
    shapes = [outline_of(source) for source in (one, other)]
    for source, shape in zip((one, other), shapes, strict=True):
        refuse(source.source, shape.family, shape.causal, shape.head)
    for name in ("dim", "layers"):
        mine, theirs = (getattr(shape, name) for shape in shapes)
        if mine != theirs:
            raise DataError(
                f"diff: {name} is {mine} in {one.source} and {theirs} in {other.source}; activations are compared "
                "between versions of one model"
            )


def _first_tokens(
    words: Sequence[Tokenizer], sources: Sequence[Checkpoint], files: Source | Sequence[Source],
    options: DifferenceOptions,
) -> Tensor:  # fmt: skip
    """The first tokens of texts, int64 [N, P], as both models read them."""
    rows: list[list[int]] = []
    for document in documents(files):
        if document.rest:
            continue
        text = document.text[: LETTERS * options.places]
        ids, theirs = (tokenizer.encode(text, add_special_tokens=True)[: options.places] for tokenizer in words)
        if ids != theirs:
            raise DataError(
                f"diff: {document.where}: {sources[0].source} and {sources[1].source} read it as other tokens; "
                "activations are compared between models of one vocabulary"
            )
        if len(ids) == options.places:
            rows.append(ids)
        if len(rows) == options.texts:
            break
    if not rows:
        raise DataError(f"diff: no text has {options.places} tokens; give longer texts, or fewer --places")
    return torch.tensor(rows)


@torch.inference_mode()
def _means(parts: Anatomy, ids_NP: Tensor, report: Callable[[int], None] | None) -> tuple[Tensor, Tensor]:
    """The mean state, [P, L, D], and the mean length of states, [P, L], of a model; float64, on the CPU."""
    N, P = ids_NP.shape
    sums_PLD = torch.zeros(P, parts.layers + 1, parts.matrix.shape[1], dtype=torch.float64)
    norms_PL = torch.zeros(P, parts.layers + 1, dtype=torch.float64)
    with evaluating(parts.model):
        for first in range(0, N, ROWS):
            ids_BP = ids_NP[first : first + ROWS].to(parts.matrix.device)
            rows, places = torch.meshgrid(*(torch.arange(n, device=ids_BP.device) for n in ids_BP.shape), indexing="ij")
            run = trace(parts, ids_BP, (rows.flatten(), places.flatten()))
            for layer, state_ND in enumerate((run.embed_PD, *run.after_LPD)):
                state_BPD = state_ND.view(len(ids_BP), P, -1).double()
                sums_PLD[:, layer] += state_BPD.sum(0).cpu()
                norms_PL[:, layer] += state_BPD.norm(dim=2).sum(0).cpu()
            if report:
                report(ids_NP[: first + ROWS].numel())
    return sums_PLD / N, norms_PL / N


@torch.inference_mode()
def _readings(parts: Anatomy, words: Tokenizer, vectors: DifferenceVectors) -> list[DifferenceReading]:
    """Each difference, and its opposite, as a state of this model: through its final norm and head, without a bias."""
    both_2PLD = torch.stack((vectors.differences_PLD, -vectors.differences_PLD))
    _, P, L, D = both_2PLD.shape
    states_PLD = parts.norm(both_2PLD.view(2 * P, L, D).to(parts.matrix))
    readout = read(states_PLD, parts.matrix, top=TOP, cap=parts.cap)
    ids = readout.top_ids_PNK.view(2, P, L, -1).tolist()
    shares = readout.top_logprobs_PNK.exp().view(2, P, L, -1).tolist()
    lengths_PL = vectors.differences_PLD.norm(dim=2)
    relative_PL = (lengths_PL / vectors.norms_PL.clamp(min=torch.finfo(torch.float32).tiny)).tolist()

    def best(side: int, place: int, state: int) -> tuple[tuple[str, int, float], ...]:
        if not lengths_PL[place, state]:
            return ()
        pairs = zip(ids[side][place][state], shares[side][place][state], strict=True)
        return tuple((token_text(index, words), index, share) for index, share in pairs)

    return [
        DifferenceReading(place, state - 1 if state else None, relative_PL[place][state],
                          best(0, place, state), best(1, place, state))
        for place in range(P) for state in range(L)
    ]  # fmt: skip
