"""Where a tile's numbers come from: a stored tensor, or its rows in another order.

A source answers "elements [first, last) of the flattened tensor" with raw bytes, into memory that the caller owns, so
that a sweep over a model allocates nothing. FP8 tensors with known scales answer in float32. Leaves out: arithmetic
(stream.py) and which rows belong together (text/tokenizer/vocabulary.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.remote.ranges import RemoteFile
from lapis.checkpoint.tensor_file import torch_dtype
from lapis.errors import CheckpointError
from lapis.weights.engine.fp8 import COMPUTABLE, FP8, Scales, read_scales, scale_name

__all__ = ["COMPUTABLE", "RowsOf", "Source", "Stored", "as_bytes", "columns_of", "read_rows"]


NEAR = 1 << 21  # elements that a disk is asked for at a time


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
        self._near = (0, 0)

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

    @contextmanager
    def lent(self, first: int, last: int) -> Iterator[torch.Tensor]:
        """Elements [first, last) where they came to from a server, while inside; they must not be changed."""
        assert self.remote is not None and not self.scaled
        place, item = self.place(first), self.dtype.itemsize
        with self.remote.lent(place, (last - first) * item) as memory:
            raw = torch.frombuffer(memory, dtype=torch.uint8)
            yield (raw.clone() if raw.data_ptr() % item else raw).view(self.dtype)

    @property
    def remote(self) -> RemoteFile | None:
        """The file on a server that it is read from, if it is."""
        return self._checkpoint.remote(self.name)

    def place(self, element: int) -> int:
        """Where an element begins, in bytes from the beginning of its file."""
        return self._checkpoint.info(self.name).start + element * self._stored.itemsize

    def prefetch(self, first: int, last: int) -> None:
        """Elements [first, last) will be read soon, once."""
        if self.remote is None:  # a disk is told of long runs, since telling it costs a call of the system
            if self._near[0] <= first and last <= self._near[1]:
                return
            last = max(last, first + NEAR)
            self._near = first, last
        item = self._stored.itemsize
        self._checkpoint.prefetch(self.name, first * item, (last - first) * item)


class RowsOf:
    """A source's rows in the order that `rows` gives; -1 is a row of zeros.

    rows: for each row of the result, the row of the source (dimension 0).
    """

    def __init__(self, source: Source, rows: Sequence[int]) -> None:
        self.inner = source
        self.role, self.name, self.dtype = source.role, source.name, source.dtype
        self.shape = (len(rows), *self.inner.shape[1:])
        self._columns = columns_of(self.inner.shape)
        self.rows = rows

    def read(self, first: int, last: int, into: memoryview) -> int:
        item, read = self.dtype.itemsize, 0
        for at, end, origin in self._runs(first, last):
            piece = into[(at - first) * item : (end - first) * item]
            if origin is None:
                piece[:] = bytes(len(piece))
            else:
                read += self.inner.read(origin, origin + end - at, piece)
        return read

    def prefetch(self, first: int, last: int) -> None:
        """As `Stored.prefetch`."""
        if isinstance(self.inner, Stored):
            for at, end, origin in self._runs(first, last):
                if origin is not None:
                    self.inner.prefetch(origin, origin + end - at)

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int, int | None]]:
        """Elements [first, last) in runs that lie together in the source: begin, end, and the source's first element or
        None for zeros."""
        columns, at = self._columns, first
        while at < last:
            row, column = divmod(at, columns)
            start, run = self.rows[row], row + 1
            # neighbors are read in one go
            while run * columns < last and self.rows[run] == (start + run - row if start >= 0 else -1):
                run += 1
            end = min(run * columns, last)
            yield at, end, start * columns + column if start >= 0 else None
            at = end


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
