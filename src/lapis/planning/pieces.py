"""Pieces: what a plan takes or leaves (a layer, its attention or MLP, or one component), and what tensors tell of them.

A tensor belongs to the piece whose name its component begins with; what stands in a block beside attention and MLP
(norms) goes with the whole layer only. The cheap signals are read from the tensors alone: how far a difference goes, in
which direction, in how many directions, how much above noise. Leaves out what a piece does to a model (effects.py).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError
from lapis.families.base import Part
from lapis.planning.options import PieceSize
from lapis.weights.diff.diff import diff, unrelated
from lapis.weights.diff.measures import Sums
from lapis.weights.diff.table import DiffTable

HALVES = ("attn", "mlp")


@dataclass(frozen=True)
class Piece:
    """layer: None for what stands outside the blocks. component: "" for the whole layer. names: tensors on disk."""

    layer: int | None
    component: str
    names: tuple[str, ...] = field(compare=False)
    parameters: int = field(compare=False)

    @property
    def label(self) -> str:
        """`3`, `3.mlp`, `3.attn.q`, `embed`."""
        return ".".join(str(x) for x in (self.layer, self.component) if x not in (None, ""))

    def entries(self) -> list[dict[str, Any]]:
        """The lines of a plan's `tune` that say this piece."""
        if self.component:
            return [{"layer": self.layer, "component": self.component}]
        return [{"layer": self.layer, "component": half} for half in HALVES]


def pieces_of(checkpoint: Checkpoint, size: PieceSize) -> list[Piece]:
    """All pieces of one size, in order; a layer's are those of its matrices and biases."""
    groups: dict[tuple[int, str], list[str]] = {}
    for name in checkpoint.names:
        part = checkpoint.part(name)
        if part.layer is not None and (component := _component(part, size)) is not None:
            groups.setdefault((part.layer, component), []).append(name)
    return [_piece(checkpoint, layer, component, names) for (layer, component), names in sorted(groups.items())]


def outside(checkpoint: Checkpoint) -> list[Piece]:
    """The token tables: embedding and head."""
    groups: dict[str, list[str]] = {}
    for name in checkpoint.names:
        part = checkpoint.part(name)
        if part.layer is None and part.component in ("embed", "head"):
            groups.setdefault(part.component, []).append(name)
    return [_piece(checkpoint, None, component, names) for component, names in groups.items()]


def together(pieces: Iterable[Piece]) -> tuple[str, ...]:
    """The tensors of several pieces, each once."""
    return tuple(dict.fromkeys(name for piece in pieces for name in piece.names))


def differences(
    base: Checkpoint, chat: Checkpoint, spectra: bool, progress: Callable[[int, int], None] | None = None
) -> DiffTable:
    """The table of differences. Raises CheckpointError where the two are not parent and child, or are the same."""
    table = diff(base, chat, spectra=spectra, progress=progress)
    if unrelated(table):
        raise CheckpointError(
            f"plan: {base.source} and {chat.source}: cosine 0.00 in every layer: these are not parent and child"
        )
    if not any(line.sums.dd for line in table.lines if line.part.layer is not None):
        raise CheckpointError(f"plan: {base.source} and {chat.source} are the same in every layer; there is no choice")
    return table


def tensor_signals(table: DiffTable, piece: Piece) -> dict[str, Any]:
    """Figures of a piece's difference as one vector.

    relative_norm, cosine; energy: its share of the squared length of all blocks' differences; with spectra
    stable_rank, rank_90, snr (of the difference) and weight_snr (of base's matrices, what Spectrum ranks by), as means
    over its matrices.
    """
    mine = [line for line in table.lines if line.name in piece.names]
    sums = sum((line.sums for line in mine), Sums())
    figures = sums.figures()
    total = sum(line.sums.dd for line in table.lines if line.part.layer is not None)
    signals = {"relative_norm": figures["relative_norm"], "cosine": figures["cosine"], "energy": sums.dd / total}
    for key in ("stable_rank", "rank_90", "snr", "weight_snr"):
        values = [line.extra[key] for line in mine if line.extra.get(key) is not None]
        if values:
            signals[key] = sum(values) / len(values)
    return signals


def _component(part: Part, size: PieceSize) -> str | None:
    half = part.component.split(".")[0]
    if half not in HALVES:
        return None
    return {"layers": "", "halves": half, "components": part.component}[size]


def _piece(checkpoint: Checkpoint, layer: int | None, component: str, names: Sequence[str]) -> Piece:
    return Piece(layer, component, tuple(names), sum(checkpoint.info(name).elements for name in names))
