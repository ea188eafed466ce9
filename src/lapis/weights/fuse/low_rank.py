"""A low-rank adapter in, kernels that add it to tiles of a weight out: W + scale * B A, and DoRA's rows of that.

Hu et al. 2021 (arXiv:2106.09685), section 4; Liu et al. 2024 (arXiv:2402.09353), section 4.1. Shapes: R rank, I inputs,
O outputs.
"""

from collections.abc import Callable
from typing import Any

import torch

from lapis.checkpoint.store import Adapter
from lapis.weights.engine.outputs import Kernel
from lapis.weights.engine.tiles import Tile


class LowRank:
    """What an adapter does to the weight of one module.

    Args:
        adapter: The adapter.
        module: A key of its pairs.
        transposed: Whether the weight lies on disk as [inputs, outputs].
        weight: Reads the base's weight as it lies on disk; called only where an adapter began by changing it.
    """

    def __init__(
        self, adapter: Adapter, module: str, *, transposed: bool, weight: Callable[[], torch.Tensor]
    ) -> None:  # fmt: skip
        self._adapter, self._module, self._transposed, self._weight = adapter, module, transposed, weight
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    def kernel(self) -> Kernel:
        if not self._adapter.dora:
            return Kernel(self._add, rows=True)
        if self._transposed:  # the length of an output is known only when all rows were seen
            return Kernel(self._renormed, (self._squares,), lambda _, parts, __: sum(parts).sqrt(), rows=True)
        return Kernel(self._renormed, rows=True)

    def _summed(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight and what is added to it, [rows of the tile, columns]."""
        if self._held is None:
            turned = self._transposed
            a_RI, b_OR = self._adapter.low_rank(self._module, lambda: self._weight().T if turned else self._weight())
            self._held = (a_RI.T.contiguous(), b_OR.T.contiguous()) if turned else (b_OR, a_RI)
        left, right = self._held
        first, last = tile.first // tile.columns, tile.last // tile.columns
        scale = self._adapter.scale(self._module)
        return tile.inputs[0].view(-1, tile.columns), (left[first:last] @ right).mul_(scale)

    def _add(self, tile: Tile, _state: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, added = self._summed(tile)
        return (weight + added).view(-1), added.view(-1)

    def _squares(self, tile: Tile, _state: Any) -> torch.Tensor:
        weight, added = self._summed(tile)
        return (weight + added).double().square().sum(0)

    def _renormed(self, tile: Tile, lengths_O: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight, added = self._summed(tile)
        moved = weight + added
        magnitude_O = self._adapter.weights.read(self._adapter.pairs[self._module]["magnitude"]).float().flatten()
        if self._transposed:
            moved *= (magnitude_O / lengths_O)[None].float()
        else:
            rows = slice(tile.first // tile.columns, tile.last // tile.columns)
            moved *= (magnitude_O[rows] / torch.linalg.vector_norm(moved, dim=1))[:, None]
        return moved.view(-1), (moved - weight).view(-1)


class StackedLowRank:
    """What an adapter does to a tensor with a matrix of each expert.

    Args:
        adapter: The adapter.
        tensor: A key of its pairs, one of `adapter.stacked`.
        inputs_first: Whether each matrix lies on disk as [inputs, outputs].
    """

    def __init__(self, adapter: Adapter, tensor: str, *, inputs_first: bool) -> None:
        self._adapter, self._tensor, self._inputs_first = adapter, tensor, inputs_first
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None

    def kernel(self) -> Kernel:
        return Kernel(self._add, rows=True)

    def _add(self, tile: Tile, _state: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self._held is None:
            a_XRI, b_XOR = self._adapter.stacks(self._tensor)
            self._held = (a_XRI.mT.contiguous(), b_XOR.mT.contiguous()) if self._inputs_first else (b_XOR, a_XRI)
        left, right = self._held
        experts = slice(tile.first // tile.columns, tile.last // tile.columns)  # a tile holds whole ones
        added = (left[experts] @ right[experts]).mul_(self._adapter.scale(self._tensor)).flatten()
        return tile.inputs[0] + added, added


def rounding() -> Kernel:
    """Only rounds to the output's dtype."""
    return Kernel(lambda tile, _: (tile.inputs[0], None))


def patch_rows(ids: list[int], values_ND: torch.Tensor) -> Callable[[int, int, torch.Tensor], int]:
    """Overwrites the rows `ids` of a [V, D] matrix."""
    columns = values_ND.shape[1]

    def patch(first: int, last: int, values: torch.Tensor) -> int:
        for row, value in zip(ids, values_ND, strict=True):
            start, end = max(row * columns, first), min((row + 1) * columns, last)
            if start < end:
                values[start - first : end - first] = value[start - row * columns : end - row * columns]
        return 0  # the adapter as a whole is a part of the job

    return patch
