"""A file on a server, read in ranges: what is asked for and a little more, checked, and tried again where it broke off.

Every answer must be 206 with the range that was asked for, unencoded and of the same ETag as before; anything else is
an error and never data. A read that breaks off goes on where it stopped. Which file that is says repository.py.
"""

import re
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lapis.checkpoint.hub.requests import Refused, ShortReadError, body, call_patiently, opened, refusal
from lapis.errors import CheckpointError

BLOCK = 4 << 20  # bytes asked for at a time
BLOCKS_HELD, AHEAD = 8, 2  # blocks of a file that are kept, and that are asked for before they are needed

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_POOL = ThreadPoolExecutor(4, thread_name_prefix="lapis-ranges")


class RemoteFile:
    """One file. name: for messages; size: its bytes; headers: of each request."""

    def __init__(self, name: str, url: str, size: int, headers: Mapping[str, str]) -> None:
        self.name, self.url, self.size = name, url, size
        self._headers = dict(headers)
        self._etag: str | None = None
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the bytes from `start` on. Thread-safe."""
        done = 0
        while done < len(buffer):
            number, offset = divmod(start + done, BLOCK)
            piece = self._block(number).result()[offset : offset + len(buffer) - done]
            if not piece:
                raise CheckpointError(f"{self.name}: has {self.size:,} bytes; there is nothing at {start + done:,}")
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def prefetch(self, start: int, size: int) -> None:
        """These bytes will be read soon; returns at once."""
        for number in range(start // BLOCK, min(start + size, self.size - 1, start + AHEAD * BLOCK) // BLOCK + 1):
            self._ask(number)

    def fetch(self, first: int, last: int) -> bytes:
        """The bytes [first, last), as they are asked for from the server."""
        got = bytearray()
        call_patiently(self.name, lambda: self._go_on(first, last, got))
        return bytes(got)

    def blocks(self, start: int) -> Iterator[bytes]:
        """All bytes from `start` on, in order; a few blocks are asked for at a time."""
        waiting: deque[Future[bytes]] = deque()
        for first in range(start, self.size, BLOCK):
            waiting.append(_POOL.submit(self.fetch, first, min(first + BLOCK, self.size)))
            if len(waiting) > BLOCKS_HELD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _block(self, number: int) -> "Future[bytes]":
        block = self._ask(number)
        for ahead in range(number + 1, number + 1 + AHEAD):
            if ahead * BLOCK < self.size:
                self._ask(ahead)
        return block

    def _ask(self, number: int) -> "Future[bytes]":
        with self._lock:
            block = self._blocks.get(number)
            if block is None or (block.done() and block.exception() is not None):
                first = number * BLOCK
                block = self._blocks[number] = _POOL.submit(self.fetch, first, min(first + BLOCK, self.size))
                while len(self._blocks) > BLOCKS_HELD:
                    self._blocks.popitem(last=False)
            self._blocks.move_to_end(number)
        return block

    def _go_on(self, first: int, last: int, got: bytearray) -> None:
        """One request, for what is still missing."""
        start = first + len(got)
        if start >= last:
            return
        request = {**self._headers, "Range": f"bytes={start}-{last - 1}"}
        with opened(self.name, self.url, request) as answer:
            if answer.status_code != 206:
                raise self._unlike(answer)
            self._check(answer, start, last)
            for piece in body(answer, last - start):
                got += piece
        if first + len(got) < last:
            raise ShortReadError(f"{first + len(got) - start:,} of {last - start:,} bytes came")

    def _check(self, answer: Any, start: int, last: int) -> None:
        answered = answer.headers.get("content-range", "")
        match = _RANGE.fullmatch(answered.strip())
        if match is None or tuple(map(int, match.groups())) != (start, last - 1, self.size):
            expected = f"bytes {start}-{last - 1}/{self.size}"
            raise Refused(
                f'{self.name}: the server answered with the range "{answered[:80]}" where {expected} was asked for'
            )
        etag = answer.headers.get("etag")
        with self._lock:
            if self._etag is None:
                self._etag = etag
            elif etag != self._etag:
                raise Refused(f"{self.name}: changed on the server while it was being read; run again")

    def _unlike(self, answer: Any) -> Exception:
        status = int(answer.status_code)
        if status == 200:
            return Refused(
                f"{self.name}: the server sends no ranges (200 for a range); load the whole model instead", 200
            )
        return refusal(self.name, status, answer.headers)
