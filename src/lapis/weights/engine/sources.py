"""Where a tile's numbers come from: a stored tensor, or its rows in another order.

A source answers "elements [first, last) of the flattened tensor" with raw bytes, into memory that the caller owns, so
that a sweep over a model allocates nothing. FP8 tensors with known scales answer in float32. Leaves out: arithmetic
(stream.py) and which rows belong together (text/tokenizer/vocabulary.py).
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.tensor_file import torch_dtype
from lapis.errors import CheckpointError
from lapis.weights.engine.fp8 import COMPUTABLE, FP8, Scales, read_scales, scale_name

__all__ = ["COMPUTABLE", "RowsOf", "Source", "Stored", "as_bytes", "columns_of", "read_rows"]


class Source(Protocol):
    """A tensor that can be read in pieces. role: who it is in the recipe ("base", "chat", ...), for messages."""

    role: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self, first: int, last: int, into: memoryview) -> int:
        """Fills `into` with the bytes of elements [first, last); returns how many bytes were read from files."""
        ...


class Stored:
    """A tensor as it lies in a checkpoint, in its own dtype; FP8 with scales as float32. scaled: whether it is that."""

    def __init__(self, role: str, checkpoint: Checkpoint, name: str) -> None:
        info = checkpoint.info(name)
        dtype = torch_dtype(info.dtype)
        if dtype is None:
            raise CheckpointError(f"{checkpoint.source}: {name} is {info.dtype}, which cannot be computed with here")
        self.role, self.name, self.shape = role, name, info.shape
        self.scaled = info.dtype in FP8 and scale_name(checkpoint, name) is not None
        self.dtype = torch.float32 if self.scaled else dtype
        self._checkpoint, self._stored = checkpoint, dtype
        self._scales: Scales | None = None

    def read(self, first: int, last: int, into: memoryview) -> int:
        if not self.scaled:
            self._checkpoint.read_into(self.name, first * self.dtype.itemsize, into)
            return len(into)
        if self._scales is None:
            self._scales = read_scales(self._checkpoint, self.name)
        values = torch.frombuffer(into, dtype=torch.float32)
        values.copy_(self._checkpoint.read_range(self.name, first, last))
        self._scales.apply(values, first, columns_of(self.shape))
        return last - first

    def prefetch(self, first: int, last: int) -> None:
        """Elements [first, last) will be read soon."""
        item = self._stored.itemsize
        self._checkpoint.prefetch(self.name, first * item, (last - first) * item)


class RowsOf:
    """A source's rows in the order that `rows` gives; -1 is a row of zeros.

    rows: for each row of the result, the row of the source (dimension 0).
    """

    def __init__(self, source: Source, rows: Sequence[int]) -> None:
        self._tensor = source
        self.role, self.name, self.dtype = source.role, source.name, source.dtype
        self.shape = (len(rows), *self._tensor.shape[1:])
        self._columns = columns_of(self._tensor.shape)
        self.rows = rows

    def read(self, first: int, last: int, into: memoryview) -> int:
        columns, item, at, read = self._columns, self.dtype.itemsize, first, 0
        while at < last:
            row, column = divmod(at, columns)
            start, run = self.rows[row], row + 1
            # neighbors are read in one go
            while run * columns < last and self.rows[run] == (start + run - row if start >= 0 else -1):
                run += 1
            end = min(run * columns, last)
            piece = into[(at - first) * item : (end - first) * item]
            if start < 0:
                piece[:] = bytes(len(piece))
            else:
                origin = start * columns + column
                read += self._tensor.read(origin, origin + end - at, piece)
            at = end
        return read


def columns_of(shape: Sequence[int]) -> int:
    """Elements of one row (everything after dimension 0); 1 for vectors and scalars."""
    result = 1
    for size in shape[1:]:
        result *= size
    return result


def read_rows(source: Source, rows: Sequence[int]) -> torch.Tensor:
    """Some rows of a source as a [len(rows), columns] tensor in its own dtype."""
    columns = columns_of(source.shape)
    result = torch.empty(len(rows), columns, dtype=source.dtype)
    for i, row in enumerate(rows):
        source.read(row * columns, (row + 1) * columns, as_bytes(result[i]))
    return result


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor as writable bytes."""
    memory: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(memory)
