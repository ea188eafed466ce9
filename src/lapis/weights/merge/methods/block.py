"""What a merge method sees: blocks of one tensor, and sweeps over them. The tensor is never needed whole.

A method is called with its parameters and answers with an `Elementwise` last step, or is a generator: each `yield`
hands out a function of a block and is sent the sum of what it gives over all blocks (numbers and tensors add up, dicts
join, in the order of the blocks); the generator returns the `Elementwise`. So norms, dot products, exact quantiles and
masks cost one more sweep and no more memory. Leaves out: where blocks come from (weights/engine/stream.py).

Shapes: R rows, C columns, N models. Every tensor is float32 [R, C]; a vector is one row, and the dimensions of a
stack before the last are rows.
"""

import hashlib
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

Result = tuple[Tensor, Tensor | None]


@dataclass
class Block:
    """A run of a tensor's elements, the same of every model; whole rows where the method asks for them.

    models: float32 [R, C] each, in the recipe's order. base: float32 [R, C] or None. Both may be overwritten. first:
    flat index of the first element in the tensor, which also identifies the block. name, seed: what random masks are
    drawn from. vector: the tensor has fewer than two dimensions. matrices: where the block is a layer's whole matrix,
    or several below each other, how many; else 0. statistics: what was gathered of each model, where a method asks for
    it and there is such: elementwise [R, C], or Gram matrices [C, C].
    """

    models: list[Tensor]
    base: Tensor | None = None
    first: int = 0
    name: str = ""
    seed: int = 0
    vector: bool = False
    matrices: int = 0
    statistics: list[Tensor] = field(default_factory=list)
    _deltas: bool = field(default=False, repr=False)

    @property
    def origin(self) -> Tensor:
        """The base, where the method requires one."""
        assert self.base is not None, "METHODS says that this method requires a base"
        return self.base

    def deltas(self) -> list[Tensor]:
        """x - b for each model, in place of the models; the models themselves where there is no base."""
        if self.base is not None and not self._deltas:
            for model in self.models:
                model.sub_(self.base)
            self._deltas = True
        return self.models

    def random(self, model: int) -> "np.ndarray[Any, np.dtype[np.uint32]]":
        """One uniform uint32 per element, [R, C], for the mask of model number `model`.

        Philox (Salmon et al. 2011) is counter-based: element i of a tensor always gets the same number, whichever
        block, thread or shard it is computed in. The key is the sha256 of seed, tensor name and model number.
        """
        shape = self.models[model].shape
        digest = hashlib.sha256(f"{self.seed}\0{self.name}\0{model}".encode()).digest()
        skip = self.first % 8  # a counter gives four uint64, that is eight uint32
        need = skip + shape.numel()
        generator = np.random.Generator(
            np.random.Philox(key=int.from_bytes(digest[:16], "little"), counter=self.first // 8)
        )
        drawn = generator.integers(0, 2**64, size=-(-need // 2), dtype=np.uint64)
        return drawn.view(np.uint32)[skip:need].reshape(shape)

    def changed(self, delta: Tensor) -> Result:
        """base + delta, in place of the base, and the delta. The end of every method that changes a base."""
        return self.origin.add_(delta), delta


_memory = threading.local()


def scratch(like: Tensor, use: str) -> Tensor:
    """A tensor of undefined content, shaped as `like`, in memory that this thread uses again under the same name.

    Fresh memory costs more than arithmetic: the kernel clears each page of it.
    """
    vectors: dict[str, Tensor] = _memory.__dict__
    held = vectors.get(use)
    if held is None or held.numel() < like.numel():
        held = vectors[use] = torch.empty(like.numel())
    return held[: like.numel()].view(like.shape)


Reduction = Callable[[Block], tuple[Any, ...]]


@dataclass(frozen=True)
class Elementwise:
    """The last step of a merge: a block of the inputs -> a block of the output and what was added to the base, if any.

    note: a line for the user.
    """

    apply: Callable[[Block], Result]
    note: str = ""


Steps = Generator[Reduction, tuple[Any, ...], Elementwise]


def total(parts: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The sum of what a reduction gave for each block: dicts join, everything else adds up, in order."""
    first, *rest = parts
    sums = [dict(value) if isinstance(value, dict) else value for value in first]
    for part in rest:
        for i, value in enumerate(part):
            if isinstance(value, dict):
                sums[i].update(value)
            else:
                sums[i] = sums[i] + value
    return tuple(sums)


@dataclass(frozen=True)
class Cut:
    """An exact order statistic of a tensor of scores: the value at a rank, and who among equals is on which side.

    Of equal scores the earlier element counts as the larger, as in a stable descending sort. quota: how many of the
    elements equal to `value` are on the upper side. equals: block -> how many equal `value` ahead of it, and in it.
    """

    value: float
    quota: int
    equals: dict[int, tuple[int, int]]

    def upper(self, block: Block, score: Tensor) -> Tensor:
        """A float mask, 1 from this rank upwards and 0 below, in place of the scores."""
        ahead, here = self.equals[block.first]
        left = self.quota - ahead
        if left <= 0:
            return score.gt_(self.value)
        if left < here:
            late = (score == self.value).view(-1).nonzero()[left:, 0]
            score.view(-1)[late] = -1.0
        return score.ge_(self.value)


def cuts(
    scores: Callable[[Block], Iterable[Tensor]], ranks: Callable[[int, int], Sequence[int]]
) -> Generator[Reduction, tuple[Any, ...], list[list[Cut]]]:
    """The scores at some ascending ranks, exactly, in two sweeps and without sorting.

    scores: a block's nonnegative float32 scores, a tensor for each thing that is ranked, which may use the same memory
    one after the other. ranks(i, count): the 0-based ranks of thing i, which has `count` elements. Nonnegative
    floats sort like their bits: the first sweep counts the upper 16 bits of all, the second the lower 16 of the
    elements whose upper bits are those.
    """

    def upper(block: Block) -> tuple[Any, ...]:
        counts: list[Any] = []
        for score in scores(block):
            count = torch.bincount(_bits(score) >> 16, minlength=1 << 15).numpy()
            values = np.flatnonzero(count)  # few of the 32,768: a block's counts stay small
            counts.append({block.first: (values.astype(np.uint16), count[values].astype(np.int32))})
        return tuple(counts)

    places: list[list[tuple[int, int]]] = []  # (upper bits, rank among the elements that have them)
    for i, blocks in enumerate((yield upper)):
        count = _counted(blocks)
        upto = count.cumsum()
        tops = [(int(np.searchsorted(upto, rank, side="right")), rank) for rank in ranks(i, int(upto[-1]))]
        places.append([(top, rank - int(upto[top] - count[top])) for top, rank in tops])

    def lower(block: Block) -> tuple[Any, ...]:
        counts: list[Any] = []
        for score, tops in zip(scores(block), places, strict=True):
            bits = _bits(score).numpy()
            for top, _ in tops:
                low = bits - (top << 16)
                low = np.compress(low.view(np.uint32) < 1 << 16, low)  # several times faster than an index
                counts.append({block.first: np.unique(low, return_counts=True)})
        return tuple(counts)

    counts = iter((yield lower))
    return [[_cut(next(counts), top, rank) for top, rank in tops] for tops in places]


def _bits(score: Tensor) -> Tensor:
    return score.reshape(-1).view(torch.int32)


def _cut(blocks: dict[int, tuple["_Ints", "_Ints"]], top: int, rank: int) -> Cut:
    """The cut at a rank among the elements whose upper bits are `top`. blocks: their lower bits, and how often."""
    upto = _counted(blocks).cumsum()
    low = int(np.searchsorted(upto, rank, side="right"))
    equals, ahead = {}, 0
    for first, (values, count) in blocks.items():
        here = int(count[values == low].sum())
        equals[first] = (ahead, here)
        ahead += here
    value = np.array([top << 16 | low], np.uint32).view(np.float32)[0]
    return Cut(float(value), int(upto[low] - rank), equals)


def _counted(blocks: dict[int, tuple["_Ints", "_Ints"]]) -> "_Ints":
    """How often each 16-bit value occurs, from each block's values and counts."""
    result = np.zeros(1 << 16, np.int64)
    for values, count in blocks.values():
        result[values] += count
    return result


_Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]


# The parameters that methods share, each with its one-line help; a signature picks among them. A parameter of type
# PerModel has one value for each model that is not the base, in the recipe's order.
PerModel = tuple[float, ...]

Weight = Annotated[PerModel, "share of each model"]
Density = Annotated[PerModel, "share of each model's difference that is kept, 0 to 1", (0, 1)]
Gamma = Annotated[PerModel, "share of each model's largest differences that is dropped as outliers", (0, 1)]
Epsilon = Annotated[PerModel, "how far keep probabilities go from density at the smallest and largest of a row", (0, 1)]
Normalize = Annotated[bool, "divide by the sum of the weights"]
Lambda = Annotated[float, "scale of the merged difference"]
Interpolation = Annotated[float, "0 gives the base, 1 the other model"]
NearswapT = Annotated[float, "distance within which the other model's elements are taken over", (0, inf)]
Rescale = Annotated[bool, "make up for what was dropped"]
Scale = Annotated[PerModel, "factor on the tensor"]
RamEpsilon = Annotated[float, "a difference up to this size counts as none", (0, inf)]
RamR = Annotated[float, "how strongly what one model owns alone is raised"]
RamAlpha = Annotated[float, "the most that the shared-to-own ratio counts", (0, inf)]
Numerics = Annotated[Literal["mergekit", "paper"], "whose choices are followed where the two differ"]
SelectTopK = Annotated[float, "share of elements, those of largest variance over the models, that is merged", (0, 1)]
Flatten = Annotated[bool, "interpolate the tensor as one vector"]
RowWise = Annotated[bool, "with nuslerp_flatten: false, interpolate column vectors (dimension 0), as mergekit names it"]
NormalizeWeights = Annotated[bool, "make the weights sum to 1"]
Eps = Annotated[float, "smallest norm that is divided by", (0, inf)]
MaxIterations = Annotated[int, "most steps towards the mean", (1, 100_000)]
Tolerance = Annotated[float, "step below which the mean is reached", (0, inf)]
AdamSteps = Annotated[int, "steps of Adam; 0 gives the exact minimum", (0, 100_000)]
AdamRate = Annotated[float, "Adam's learning rate", (0, inf)]
OffDiagonal = Annotated[float, "what is left of a Gram matrix off its diagonal", (0, 1)]
FisherFloor = Annotated[float, "the least that an element's Fisher information counts", (0, inf)]
FilterWise = Annotated[bool, "one ratio for each row instead of for the tensor"]
