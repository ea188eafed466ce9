"""Tiles: the pieces in which tensors are read and computed, and the buffers they are read into.

A tile is a run of elements short enough to stay in a core's share of the cache. How a tensor is cut depends on its
shape alone, so the result of a sum over tiles does not depend on threads. Leaves out: writing (stream.py).
"""

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch

from lapis.config import environment_number
from lapis.weights.engine.ahead import Reads, ahead
from lapis.weights.engine.sources import RowsOf, Source, Stored, as_bytes, columns_of

TILE = 1 << 18  # elements
_CORES = max(1, (os.cpu_count() or 1) // max(1, environment_number("LOCAL_WORLD_SIZE", 1)))  # for this process
THREADS = min(4, 1 + _CORES)  # one more than cores, since one is often waiting for the disk
_CHUNK = 1 << 16  # elements that are summed in float32 before the sum goes on in float64

_ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64's, whose bits are well mixed

T = TypeVar("T")


@dataclass
class Tile:
    """One piece of a tensor. inputs: float32 vectors, one per source, which may be overwritten.

    first, last: the elements of the flattened tensor; columns: the length of its rows.
    """

    name: str
    first: int
    last: int
    columns: int
    inputs: list[torch.Tensor]


def spans(shape: Sequence[int], *, rows: bool = False, whole: bool = False) -> list[tuple[int, int]]:
    """Where the tiles of a tensor begin and end. rows: at whole rows, at least one. whole: one tile."""
    count, columns = prod(shape), columns_of(shape)
    size = max(count, 1) if whole else max(TILE // max(columns, 1), 1) * max(columns, 1) if rows else TILE
    return [(first, min(first + size, count)) for first in range(0, count, size)]


class Buffer:
    """Bytes that grow to the largest need and are used again; seen as a tensor of any dtype."""

    def __init__(self) -> None:
        self._tensor = torch.empty(0, dtype=torch.uint8)
        self._view = memoryview(b"")

    def of(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """A vector of `count` elements in this memory; what was there before is lost."""
        need = count * dtype.itemsize
        if need > self._tensor.numel():
            self._tensor = torch.empty(need, dtype=torch.uint8)
            self._view = as_bytes(self._tensor)
        return self._tensor[:need].view(dtype)

    def bytes(self, size: int) -> memoryview:
        return self._view[:size]


class Held:
    """The stored bytes of one tensor's tiles, kept from its first pass to its last, in memory that is used again."""

    def __init__(self, spare: "SimpleQueue[Buffer]") -> None:
        self._spare = spare
        self._tiles: dict[tuple[int, int], Buffer] = {}

    def bytes(self, first: int, source: int) -> tuple[Buffer, bool]:
        """The buffer of a tile of one source, and whether it is filled already."""
        buffer = self._tiles.get((first, source))
        if buffer is not None:
            return buffer, True
        try:
            buffer = self._spare.get_nowait()
        except Empty:
            buffer = Buffer()
        self._tiles[first, source] = buffer
        return buffer, False

    def release(self, first: int) -> None:
        """The tile that begins there is done with."""
        source = 0
        while (buffer := self._tiles.pop((first, source), None)) is not None:
            self._spare.put(buffer)
            source += 1


class Reader:
    """Reads tiles into buffers of its own, widened to float32; one per thread."""

    def __init__(self) -> None:
        self._stored, self._wide = Buffer(), [Buffer()]
        self._taken = self.checksum = 0

    def read(
        self,
        name: str,
        sources: Sequence[Source],
        first: int,
        last: int,
        shape: Sequence[int],
        held: "Held | None" = None,
    ) -> Tile:
        """The tile [first, last) of every source. The last tile's memory is used again.

        held: where the bytes of an earlier pass over this tensor are, and those of this tile are kept.
        `checksum` is then that of the bytes of all sources.
        """
        count, inputs = last - first, []
        self.checksum = 0
        while len(self._wide) < len(sources):
            self._wide.append(Buffer())
        for at, (source, buffer) in enumerate(zip(sources, self._wide, strict=False)):
            vector = buffer.of(count, torch.float32)
            if source.dtype is torch.float32:
                self._taken += source.read(first, last, buffer.bytes(count * 4))
                self.checksum += read_checksum(source, vector, at, first)
            elif held is None and isinstance(source, Stored) and source.remote is not None:
                with source.lent(first, last) as stored:
                    vector.copy_(stored)
                    self._taken += stored.nbytes
            else:
                bytes_, known = (self._stored, False) if held is None else held.bytes(first, at)
                stored = bytes_.of(count, source.dtype)
                if not known:
                    self._taken += source.read(first, last, bytes_.bytes(count * source.dtype.itemsize))
                self.checksum += read_checksum(source, stored, at, first)
                vector.copy_(stored)
            inputs.append(vector)
        return Tile(name, first, last, columns_of(shape), inputs)

    def taken(self) -> int:
        """Bytes read since this was last asked."""
        result, self._taken = self._taken, 0
        return result


def read_checksum(source: Source, values: torch.Tensor, number: int, first: int) -> int:
    """The `checksum` of what was read of a source; 0 where that lies on a server, whose version tells."""
    inner = source.inner if isinstance(source, RowsOf) else source
    return 0 if isinstance(inner, Stored) and inner.remote is not None else checksum(values, number, first)


def checksum(values: torch.Tensor, source: int, first: int) -> int:
    """A number of 64 bits for the bytes of one tile; those of several are added up.

    It tells one model from another, which takes no cryptography, and is made while the bytes are in the cache.

    Args:
        values: The bytes as they were read, as a contiguous vector of any dtype.
        source: Which of the tensor's sources they are.
        first: Where in the tensor they begin.
    """
    if values.nbytes % 8 == 0 and values.storage_offset() * values.itemsize % 8 == 0:
        total = int(values.view(torch.int64).sum())
        return (total + (source + 1) * _ODD[0] + first * _ODD[1]) * _ODD[2] % 2**64
    raw = values.view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % 8 else raw
    even = raw.numel() // 8 * 8
    total = int(raw[:even].view(torch.int64).sum()) + int.from_bytes(bytes(raw[even:].tolist()), "little")
    return (total + (source + 1) * _ODD[0] + first * _ODD[1]) * _ODD[2] % 2**64


def dot(one: torch.Tensor, other: torch.Tensor) -> float:
    """The dot product of two float32 vectors, in float64 over short stretches (relative error near 1e-8)."""
    if one.numel() <= _CHUNK:
        return float(torch.dot(one, other))
    pairs = zip(torch.split(one, _CHUNK), torch.split(other, _CHUNK), strict=True)
    return sum((float(torch.dot(a, b)) for a, b in pairs), 0.0)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Inside, torch computes each operation on one thread, since the threads here share the cores by tiles, and memory
    that was freed stays with the process: clearing the pages of each temporary anew took a third of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _keep_freed(1 << 30)
    try:
        yield
    finally:
        _keep_freed(64 << 20)  # what glibc's own value grows to, so that a training behind a merge is as fast as alone
        torch.set_num_threads(before)


def _keep_freed(size: int) -> None:
    """Lets the allocator keep up to `size` bytes that are free at its end, and take as large pieces from it."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, size)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, min(size, 32 << 20))  # M_MMAP_THRESHOLD, which has this limit
        if size < 1 << 30:
            libc.malloc_trim(0)
    except (OSError, AttributeError):  # another allocator
        return


def each(
    tasks: Sequence[T],
    work: Callable[[Reader, T], None],
    progress: Callable[[int, int], None] | None = None,
    reads: Callable[[T], Reads] = lambda task: (),
) -> int:
    """Runs work(reader, task) for every task on a few threads, each with its own reader; returns the bytes read.

    The first error stops all and is raised. progress(done, total) counts tasks. reads(task): what it will read.
    """
    lock, waiting = threading.Lock(), ahead(tasks, reads)
    failures: list[BaseException] = []
    read = done = 0

    def run() -> None:
        nonlocal read, done
        reader = Reader()
        try:
            while not failures:
                with lock:
                    task = next(waiting, None)
                if task is None:
                    return
                work(reader, task)
                with lock:
                    read += reader.taken()
                    done += 1
                    if progress:
                        progress(done, len(tasks))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(THREADS)]
    with one_thread_each():
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.2)
        except BaseException as error:
            failures.insert(0, error)
            for thread in threads:
                thread.join()
    if failures:
        raise failures[0]
    return read
