"""A merge method as the engine runs it: its sweeps become passes, its last step the tile that is written.

Leaves out: the methods (methods/), the engine (stream.py).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import torch

from lapis.weights.engine.sources import Source, read_rows
from lapis.weights.engine.stream import Kernel
from lapis.weights.engine.tiles import Tile
from lapis.weights.merge.methods import Method
from lapis.weights.merge.methods.block import Block, Elementwise, Reduction, Steps, total


def kernel_of(
    method: Method,
    parameters: Mapping[str, Any],
    name: str,
    shape: tuple[int, ...],
    *,
    models: int,
    base: bool,
    seed: int = 0,
    layer: bool = True,
    grams: Sequence[Source] = (),
    method_notes: Counter[str] | None = None,
) -> Kernel:
    """The kernel for one tensor. Its tiles' inputs are the models in order, the base where there is one, and statistics
    of the models that have the tensor's shape.

    parameters: by recipe names, per-model ones as tuples. layer: what has two dimensions is a layer's matrix, and no
    table of tokens. grams: of the models, where the method asks for these. method_notes: counts what the method has to
    say of the tensor.
    Raises ConfigError for parameters that the method cannot take.
    """
    vector = len(shape) < 2
    stacked = prod(shape[:-2]) if method.matrices and layer and len(shape) in (2, 3) and 0 not in shape else 0

    def block(tile: Tile) -> Block:
        columns = shape[-1] if shape and (method.rows or stacked) else tile.last - tile.first
        inputs = [vector.view(-1, columns) for vector in tile.inputs]
        statistics = inputs[models + base :] or [read_rows(gram, range(columns)).float() for gram in grams]
        return Block(
            inputs[:models], inputs[models] if base else None, tile.first, name, seed, vector, stacked, statistics
        )

    steps = method.start(parameters, models)
    begin: Reduction | Elementwise
    if isinstance(steps, Elementwise):
        begin = steps
    else:
        try:
            begin = next(steps)
        except StopIteration as end:
            begin = end.value
    if isinstance(begin, Elementwise):
        note(method_notes, begin)

    def sweep(tile: Tile, reduction: Reduction | None) -> tuple[Any, ...]:
        return (reduction or begin)(block(tile))  # type: ignore[operator]

    running: Steps | None = None if isinstance(steps, Elementwise) else steps
    noted = False

    def fold(step: int, parts: list[tuple[Any, ...]], _state: Any) -> Reduction | Elementwise:
        """A stage whose passes were forgotten makes them again, so the first of them begins anew."""
        nonlocal running, noted
        if running is None:
            again = method.start(parameters, models)
            assert step == 0 and not isinstance(again, Elementwise)
            running = again
            next(running)
        try:
            return running.send(total(parts))
        except StopIteration as end:
            running = None
            if not noted:
                note(method_notes, end.value)
            noted = True
            last: Elementwise = end.value
            return last

    def apply(tile: Tile, state: Elementwise | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        last = state or begin
        assert isinstance(last, Elementwise)
        result, delta = last.apply(block(tile))
        return result.reshape(-1), None if delta is None else delta.reshape(-1)

    count = 0
    if not isinstance(begin, Elementwise) and 0 not in shape:
        count = _sweeps(method, tuple(sorted(parameters.items())), models, base)
    whole = bool(stacked) or (method.rows and vector)  # a vector is one row
    return Kernel(apply, (sweep,) * count, fold if count else None, rows=method.rows and not whole, whole=whole)


def note(method_notes: Counter[str] | None, last: Elementwise) -> None:
    if method_notes is not None and last.note:
        method_notes[last.note] += 1


@cache
def _sweeps(method: Method, parameters: tuple[tuple[str, Any], ...], models: int, base: bool) -> int:
    """How many sweeps a method makes. It depends on its parameters alone, so a trial on a few numbers tells."""
    drawn = torch.rand(models + 1, 2, 4, generator=torch.Generator().manual_seed(0))

    def block() -> Block:
        *inputs, last = drawn.clone().unbind()
        return Block(inputs, last if base else None, name="trial")

    steps = method.start(dict(parameters), models)
    assert not isinstance(steps, Elementwise)
    count, reduction = 1, next(steps)
    while True:
        try:
            reduction = steps.send(reduction(block()))
        except StopIteration:
            return count
        count += 1
