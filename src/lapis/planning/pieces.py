"""Pieces: what a plan takes or leaves (a layer, its attention or MLP, or one component), and a model to put them into.

A tensor belongs to the piece whose name its component begins with: `attn`, `delta` or `mlp`, or where the family is not
known, what follows the layer's number in its name (`self_attn`, `fc1`); norms that stand beside these are in no piece.
The cheap signals are read from the tensors alone: how far a difference goes, in which direction, in how many
directions, how much above noise.

On the bench lies one model in memory, whose tensors can be set to base's, to chat's, or to anything on the line between
them. Nothing is added and subtracted again: a tensor is read anew from its checkpoint, so what was put in is taken out
without a trace. At most one tensor of each model is held beside the model, large ones by rows. The rows of the chat
template's tokens are chat's from the start, as in a graft. Leaves out what a piece does to a model (effects.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError
from lapis.families.base import Part
from lapis.model.reading.load import load_readable
from lapis.model.reading.places import Region, places_of, tensors_of
from lapis.model.reading.readable import ReadableModel
from lapis.planning.options import PieceSize
from lapis.weights.diff.diff import diff
from lapis.weights.diff.measures import Sums
from lapis.weights.diff.table import DiffTable
from lapis.weights.matching import counterparts, is_norm, is_vocabulary


@dataclass(frozen=True)
class Piece:
    """layer: None for what stands outside the blocks. component: "" for the whole layer. names: tensors on disk.
    halves: what a layer is made of."""

    layer: int | None
    component: str
    names: tuple[str, ...] = field(compare=False)
    parameters: int = field(compare=False)
    halves: tuple[str, ...] = field(default=("attn", "mlp"), compare=False)

    @property
    def label(self) -> str:
        """`3`, `3.mlp`, `3.attn.q`, `embed`."""
        return ".".join(str(x) for x in (self.layer, self.component) if x not in (None, ""))

    def entries(self) -> list[dict[str, Any]]:
        """The lines of a plan's `tune` that say this piece."""
        return [{"layer": self.layer, "component": component} for component in self.components]

    @property
    def components(self) -> tuple[str, ...]:
        """Its name among the components of a layer; of a whole layer the names of all that it is made of."""
        return (self.component,) if self.component else self.halves


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
    """The table of differences. Raises CheckpointError where the two are the same."""
    table = diff(base, chat, spectra=spectra, progress=progress)
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


def _half(part: Part) -> str | None:
    """What of a layer a part belongs to; None for norms beside it."""
    half = part.component.split(".")[0]
    return None if half == "norm" or is_norm(Part(part.layer, half, part.kind)) else half


def _component(part: Part, size: PieceSize) -> str | None:
    half = _half(part)
    return None if half is None else {"layers": "", "halves": half, "components": part.group}[size]


def _piece(checkpoint: Checkpoint, layer: int | None, component: str, names: Sequence[str]) -> Piece:
    halves = dict.fromkeys(half for name in names if (half := _half(checkpoint.part(name))))
    size = sum(checkpoint.info(name).elements for name in names)
    return Piece(layer, component, tuple(names), size, tuple(sorted(halves)))


Side = Literal["home", "chat"]
CHUNK = 1 << 22  # elements of a large tensor that are mixed at a time


class Bench:
    """The model of `home` (base itself, or a continuation of it), loaded; differences are chat - base.

    template: rows of home -> rows of chat that they are throughout. model: our own or transformers', in float32.
    """

    def __init__(
        self, home: Checkpoint, base: Checkpoint, chat: Checkpoint, template: Mapping[int, int] | None = None
    ) -> None:
        self.home, self.base, self.chat = home, base, chat
        self.template = dict(template or {})
        self._names = {"base": counterparts(home, base), "chat": counterparts(home, chat)}
        self.model: ReadableModel = load_readable(home, torch.float32)
        self.model.requires_grad_(False)
        self._places = places_of(home, self.model)
        self._tensors = tensors_of(self.model)
        self.vocabulary = [name for name in self._places if is_vocabulary(home.part(name))]
        self._check_places()
        for name in self.vocabulary:
            self.put([name], "home")

    def movable(self, name: str) -> bool:
        """Whether a tensor of home has a place in the model and a difference to add."""
        return name in self._places and all(name in names for names in self._names.values())

    def regions(self, name: str) -> tuple[Region, ...]:
        """The parts of the model that a tensor on disk fills."""
        return self._places[name].regions

    def parameter(self, name: str) -> Tensor:
        """A parameter, or a buffer, of the model."""
        return self._tensors[name]

    @torch.no_grad()
    def put(self, names: Iterable[str], side: Side, scale: float = 1.0) -> None:
        """Sets tensors to home's, or to home + scale * (chat - base); with scale 1 and home = base that is chat's."""
        for name in names:
            if not self.movable(name):
                continue
            place = self._places[name]
            elements = self.home.info(name).elements
            if place.flat and elements > CHUNK:
                flat = self._tensors[place.regions[0].parameter].view(-1)
                for first in range(0, elements, CHUNK):
                    last = min(first + CHUNK, elements)
                    flat[first:last] = self._mixed(name, side, scale, first, last)
            else:
                whole = self._mixed(name, side, scale, 0, elements).view(self.home.info(name).shape)
                for region, value in zip(place.regions, place.split(whole), strict=True):
                    region.of(self._tensors[region.parameter]).copy_(value)
            if name in self.vocabulary:
                self._put_template(name)

    @torch.no_grad()
    def difference(self, name: str) -> tuple[Tensor, ...]:
        """chat - base, float32, in the shapes of the regions that the tensor fills; 0 in the template's rows."""
        delta = self._delta(name, 0, self.home.info(name).elements).view(self.home.info(name).shape)
        if name in self.vocabulary:
            delta[list(self.template)] = 0
        return self._places[name].split(delta)

    def _check_places(self) -> None:
        """Refuses a layer's tensor that differs between base and chat and has no place in the model."""
        for name in self.home.names:
            if self.home.runs is not None or name in self._places or self.home.part(name).layer is None:
                continue
            if all(name in names for names in self._names.values()) and self._changed(name):
                raise CheckpointError(
                    f"{self.home.source}: {name} has no place in the model that transformers makes of it, and chat has "
                    f"another than base; the tensors alone can be planned with, without --chats"
                )

    def _changed(self, name: str) -> bool:
        return bool(self._delta(name, 0, self.home.info(name).elements).any())

    def _mixed(self, name: str, side: Side, scale: float, first: int, last: int) -> Tensor:
        if side == "chat" and scale == 1.0 and self.home is self.base:
            return self.chat.read_range(self._names["chat"][name], first, last).float()
        own = self.home.read_range(name, first, last).float()
        return own if side == "home" else own.add_(self._delta(name, first, last), alpha=scale)

    def _delta(self, name: str, first: int, last: int) -> Tensor:
        chat = self.chat.read_range(self._names["chat"][name], first, last).float()
        return chat.sub_(self.base.read_range(self._names["base"][name], first, last).float())

    def _put_template(self, name: str) -> None:
        (region,) = self.regions(name)
        for row, other in self.template.items():
            value = self.chat.read_rows(self._names["chat"][name], other, other + 1)[0].float()
            region.of(self._tensors[region.parameter])[row] = value
