"""Pieces: what a plan takes or leaves, a layer, its attention or MLP, or one component of it.

A tensor belongs to the piece whose name its component begins with; what stands in a block beside attention and MLP
(norms) goes with the whole layer only. Leaves out: what a piece is worth (signals), and which are taken (choose.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lapis.checkpoint import Checkpoint
from lapis.families.base import Part

Size = Literal["layers", "halves", "components"]
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


def pieces_of(checkpoint: Checkpoint, size: Size) -> list[Piece]:
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


def _component(part: Part, size: Size) -> str | None:
    half = part.component.split(".")[0]
    if half not in HALVES:
        return None
    return {"layers": "", "halves": half, "components": part.component}[size]


def _piece(checkpoint: Checkpoint, layer: int | None, component: str, names: Sequence[str]) -> Piece:
    return Piece(layer, component, tuple(names), sum(checkpoint.info(name).elements for name in names))
