"""Where each tensor of a folder lies in the model that was made of it: to set it anew, or to read its gradient.

Of our own models the family's table says it. Of a model of transformers it is found out: transformers is handed tensors
that hold nothing but their number, and where a number lies in the model, there lies its tensor; the real values then
prove it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError
from lapis.families.base import Rule
from lapis.families.shapes import SAME
from lapis.model.check import plan_load
from lapis.model.reading.opening import load_tensors
from lapis.model.reading.outside import OutsideModel
from lapis.model.reading.readable import ReadableModel

Index = tuple[int | slice, ...]
FIRST = 2**22  # the first number: no buffer that a model computes for itself holds such ones


@dataclass(frozen=True)
class Region:
    """A part of a parameter (or buffer) of a model.

    Attributes:
        parameter: Its name.
        index: Which part; empty for the whole.
        turned: What is put there lies with its last two dimensions swapped.
    """

    parameter: str
    index: Index = ()
    turned: bool = False

    def of(self, parameter: Tensor) -> Tensor:
        """The part of a parameter, or of its gradient, as a view."""
        part = parameter[self.index] if self.index else parameter
        return part.transpose(-1, -2) if self.turned else part


@dataclass(frozen=True)
class Placement:
    """What a tensor on disk fills.

    Attributes:
        regions: One, or several where the model has apart what the disk holds as one.
        split: The tensor on disk -> the values of each region.
        flat: The one region is a whole parameter, and holds the numbers in the order of the disk.
    """

    regions: tuple[Region, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    flat: bool


def tensors_of(model: ReadableModel) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def places_of(checkpoint: Checkpoint, model: ReadableModel) -> dict[str, Placement]:
    """The place of each tensor that has one.

    Args:
        checkpoint: The folder.
        model: What was loaded from it, in float32, unchanged.

    Raises:
        CheckpointError: transformers computes with a tensor as it loads it, so that it lies nowhere as it is.
    """
    if isinstance(model, OutsideModel):
        return _proved(checkpoint, model, _numbered(checkpoint))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    return {
        name: Placement(
            tuple(map(Region, targets)),
            _by_rule(rule, [shapes[t] for t in targets]),
            rule.transform.apply is SAME.apply,
        )
        for name, rule, targets in plan_load(checkpoint).steps
    }


def _by_rule(rule: Rule, shapes: Sequence[tuple[int, ...]]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda whole: rule.transform.apply(whole, shapes)


def _numbered(checkpoint: Checkpoint) -> dict[str, list[Region]]:
    """Tensor -> where its number lies in a model of numbers."""
    names = checkpoint.names
    numbers = {
        name: torch.tensor(float(number)).expand(checkpoint.info(name).shape)
        for number, name in enumerate(names, FIRST)
    }
    lying: dict[str, list[Region]] = {}
    for target, tensor in tensors_of(load_tensors(checkpoint, numbers, torch.float32)).items():
        for number, index in _boxes(tensor):
            if number.is_integer() and 0 <= number - FIRST < len(names):
                lying.setdefault(names[int(number) - FIRST], []).append(Region(target, index))
    return lying


def _boxes(tensor: Tensor) -> Iterator[tuple[float, Index]]:
    """The parts of a tensor that hold one number each, where it is cut straight through along its dimensions."""
    if not tensor.is_floating_point() or not tensor.numel():
        return
    cuts: list[list[slice]] = []
    for dim in range(tensor.dim()):
        line = tensor[(0,) * dim + (slice(None),) + (0,) * (tensor.dim() - dim - 1)]
        ends = [0, *((line[1:] != line[:-1]).nonzero().flatten() + 1).tolist(), len(line)]
        cuts.append([slice(first, last) for first, last in pairwise(ends)])
    for index in product(*cuts):
        part = tensor[index]
        number = part.flatten()[0].item()
        if bool((part == number).all()):
            yield number, index


def _proved(checkpoint: Checkpoint, model: OutsideModel, lying: dict[str, list[Region]]) -> dict[str, Placement]:
    """Places where the model holds just what the folder holds; a tensor of which it holds something else is refused."""
    tensors, places, lost = tensors_of(model), dict[str, Placement](), list[str]()
    for name, regions in lying.items():
        value = checkpoint.read(name).float()
        pieces = [piece for region in regions if (piece := _piece(region, tensors[region.parameter], value))]
        if sum(value[source].numel() for _, source in pieces) != value.numel() or len(pieces) < len(regions):
            lost.append(name)
            continue
        own = tuple(region for region, _ in pieces)
        flat = len(own) == 1 and own[0] == Region(own[0].parameter) and tensors[own[0].parameter].is_contiguous()
        places[name] = Placement(own, _by_index([source for _, source in pieces]), flat)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.source}: transformers computes with {lost[0]}{more} as it loads "
            f"them, so that no difference can be put there; the tensors alone can be planned with, without --chats"
        )
    return places


def _by_index(sources: Sequence[Index]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda whole: tuple(whole[source] for source in sources)


def _piece(region: Region, parameter: Tensor, value: Tensor) -> tuple[Region, Index] | None:
    """The region as the tensor fits into it, and which part of the tensor lies there; None where none does."""
    spare = parameter.dim() - value.dim()
    index = tuple(s.start if i < spare else s for i, s in enumerate(region.index) if isinstance(s, slice))
    whole = all(isinstance(s, slice) and s == slice(0, n) for s, n in zip(index, parameter.shape, strict=False))
    for turned in (False, True):
        here = Region(region.parameter, () if whole and spare <= 0 else index, turned)
        if spare < 0 or (turned and value.dim() < 2):
            continue
        held = here.of(parameter)
        if any(n % m for n, m in zip(value.shape, held.shape, strict=True)):
            continue
        for corner in product(*(range(0, n, m) for n, m in zip(value.shape, held.shape, strict=True))):
            source = tuple(slice(at, at + m) for at, m in zip(corner, held.shape, strict=True))
            if torch.equal(value[source], held):
                return here, source
    return None
