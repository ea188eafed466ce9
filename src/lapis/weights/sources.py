"""Where a tile's numbers come from: a stored tensor, or its rows in another order.

A source answers "elements [first, last) of the flattened tensor" with raw bytes, into memory that the caller owns, so
that a sweep over a model allocates nothing. Leaves out: arithmetic (stream.py) and which rows belong together
(vocabulary.py).
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.store import torch_dtype
from lapis.errors import CheckpointError

COMPUTABLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
    """A tensor as it lies in a checkpoint."""

    def __init__(self, role: str, checkpoint: Checkpoint, name: str) -> None:
        info = checkpoint.info(name)
        dtype = torch_dtype(info.dtype)
        if dtype is None:
            raise CheckpointError(f"{checkpoint.source}: {name} is {info.dtype}, which cannot be computed with here")
        self.role, self.name, self.dtype, self.shape = role, name, dtype, info.shape
        self._checkpoint = checkpoint

    def read(self, first: int, last: int, into: memoryview) -> int:
        self._checkpoint.read_into(self.name, first * self.dtype.itemsize, into)
        return len(into)


class Rows:
    """A tensor's rows in the order that `rows` gives; -1 is a row of zeros. Read in whole rows.

    rows: for each row of the result, the row of the stored tensor (dimension 0).
    """

    def __init__(self, role: str, checkpoint: Checkpoint, name: str, rows: Sequence[int]) -> None:
        self._stored = Stored(role, checkpoint, name)
        self.role, self.name, self.dtype = role, name, self._stored.dtype
        self.shape = (len(rows), *self._stored.shape[1:])
        self._columns = columns_of(self._stored.shape)
        self._rows = rows

    def read(self, first: int, last: int, into: memoryview) -> int:
        columns, width = self._columns, self._columns * self.dtype.itemsize
        row, end, done = first // columns, last // columns, 0
        while row < end:
            run = row + 1
            start = self._rows[row]
            if start < 0:
                while run < end and self._rows[run] < 0:
                    run += 1
                into[done : done + (run - row) * width] = bytes((run - row) * width)
            else:
                while run < end and self._rows[run] == start + run - row:
                    run += 1
                self._stored.read(
                    start * columns, (start + run - row) * columns, into[done : done + (run - row) * width]
                )
            done += (run - row) * width
            row = run
        return done


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
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
