"""Merges of tensors that are in memory: what a streamed merge must equal, bit by bit."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lapis.weights.merge.methods import METHODS, Block, Elementwise
from lapis.weights.merge.methods.block import Reduction, Steps, total


def merge_tensors(
    method: str,
    models: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    name: str = "",
    seed: int = 0,
    elements: int = 1 << 20,
    layer: bool = True,
    statistics: Sequence[Tensor] = (),
) -> Tensor:
    """Merges tensors of one shape that are in memory -> float32 of that shape. A pure function of its arguments.

    parameters: by recipe names; per-model ones as one number or one for each model. name, seed: where random masks come
    from. elements: the size of a block, which changes nothing but memory. layer: the tensor is no table of tokens.
    statistics: of each model, for methods that have such.
    """
    shape = models[0].shape
    if not shape.numel():
        return torch.zeros(shape)
    columns = shape[-1] if shape else 1
    matrices = [tensor.reshape(-1, columns) for tensor in models]
    count = prod(shape[:-2]) if METHODS[method].matrices and layer and len(shape) in (2, 3) else 0
    step = len(matrices[0]) if count else max(1, elements // columns)

    def block(first: int) -> Block:
        def cut(matrix: Tensor) -> Tensor:
            return matrix[first : first + step].to(torch.float32, copy=True)

        return Block(
            [cut(matrix) for matrix in matrices],
            None if base is None else cut(base.reshape(-1, columns)),
            first * columns,
            name,
            seed,
            len(shape) < 2,
            count,
            list(statistics) if METHODS[method].statistics == "gram" else [cut(each) for each in statistics],
        )

    def sweep(reduction: Reduction) -> list[tuple[Any, ...]]:
        return [reduction(block(first)) for first in range(0, len(matrices[0]), step)]

    last = finish(METHODS[method].start(parameters or {}, len(models)), sweep)
    return torch.cat([last.apply(block(first))[0] for first in range(0, len(matrices[0]), step)]).reshape(shape)


def finish(steps: Elementwise | Steps, sweep: Callable[[Reduction], Iterable[tuple[Any, ...]]]) -> Elementwise:
    """Runs a method up to its last step. `sweep(f)` gives f(block) for every block, in order."""
    if isinstance(steps, Elementwise):
        return steps
    answer: Any = None
    while True:
        try:
            answer = total(sweep(steps.send(answer)))
        except StopIteration as end:
            last: Elementwise = end.value
            return last
