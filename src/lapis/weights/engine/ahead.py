"""Tasks in, the same tasks out, each a little later: what they read is asked for when they come in.

So that disks and networks work while we compute, and memory is bounded by what was asked for and not read yet. What is
asked for is exactly what will be read, once, in the order of reading; neighbors become one request where they are sent
(checkpoint/remote/ranges.py).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from lapis.weights.engine.sources import RowsOf, Source, Stored

AHEAD = 16 << 20  # bytes of inputs, of all sources together; 1 Gbit/s has 6 MB on its way in 50 ms

T = TypeVar("T")
Reads = Iterable[tuple[Source, int, int]]
"""What a task reads: sources, and the first and last of their elements."""


def ahead(tasks: Iterable[T], reads: Callable[[T], Reads], limit: int | None = None) -> Iterator[T]:
    """Yields the tasks in order, about `limit` bytes (default: AHEAD) of inputs after they were asked for."""
    limit = AHEAD if limit is None else limit
    waiting: deque[tuple[T, int]] = deque()
    pending = 0
    for task in tasks:
        size = 0
        for source, first, last in reads(task):
            if isinstance(source, (Stored, RowsOf)):
                source.prefetch(first, last)
            size += (last - first) * source.dtype.itemsize
        waiting.append((task, size))
        pending += size
        while waiting and pending > limit:
            task, size = waiting.popleft()
            pending -= size
            yield task
    while waiting:
        yield waiting.popleft()[0]
