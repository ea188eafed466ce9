"""A file on a server, read in ranges: what is asked for and a little more, checked, and tried again where it broke off.

Every answer must be 206 with the range that was asked for, unencoded and of the same ETag as before; anything else is
an error and never data. A read that breaks off goes on where it stopped. Leaves out: which file that is (hub.py).
"""

import contextlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from lapis.errors import CheckpointError

BLOCK = 4 << 20  # bytes asked for at a time
BLOCKS_HELD, AHEAD = 8, 2  # blocks of a file that are kept, and that are asked for before they are needed
TRIES = 5
PAUSE = 0.5  # seconds before the second try; each further one waits twice as long
LONGEST = 60.0  # seconds of Retry-After that are waited for
TIMEOUT = 30.0  # seconds without a byte

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_AGAIN = (408, 429, 500, 502, 503, 504)
_POOL = ThreadPoolExecutor(4, thread_name_prefix="lapis-ranges")


class Refused(CheckpointError):
    """An answer that trying again does not change. status: the server's, or 0."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class RemoteFile:
    """One file. name: for messages; size: its bytes; client: as huggingface_hub makes it (httpx); errors: its base."""

    def __init__(self, name: str, url: str, size: int, client: Callable[[], Any], headers: Mapping[str, str],
                 errors: type[Exception]) -> None:  # fmt: skip
        self.name, self.url, self.size = name, url, size
        self._client, self._errors = client, errors
        self._headers = {**headers, "Accept-Encoding": "identity"}
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
        for attempt in patiently(self.name, self._errors):
            with attempt:
                self._go_on(first, last, got)
            if attempt.done:
                break
        return bytes(got)

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
        with self._client().stream("GET", self.url, headers=request, timeout=TIMEOUT, follow_redirects=True) as answer:
            if answer.status_code != 206:
                raise self._unlike(answer)
            self._check(answer, start, last)
            for chunk in answer.iter_raw():
                got += chunk
                if len(got) > last - first:
                    raise Refused(f"{self.name}: the server sent more than the {last - start:,} bytes asked for")
        if first + len(got) < last:
            raise ShortReadError(f"{first + len(got) - start:,} of {last - start:,} bytes came")

    def _check(self, answer: Any, start: int, last: int) -> None:
        encoding = answer.headers.get("content-encoding", "identity")
        if encoding not in ("", "identity"):
            raise Refused(f"{self.name}: the server encoded a range as {encoding}; a proxy in between may do that")
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
            return Refused(f"{self.name}: the server sends no ranges (200 for a range); load the whole model instead")
        return refusal(self.name, status, answer.headers)


class ShortReadError(Exception):
    """A body that ended early."""


class AgainError(Exception):
    """An answer to wait for and try again. after: seconds that the server asked for, or None."""

    def __init__(self, message: str, after: float | None) -> None:
        super().__init__(message)
        self.after = after


class Attempt(contextlib.AbstractContextManager["Attempt"]):
    """One try, as a context: what may pass is swallowed and waited for, the last one is told in a line."""

    def __init__(self, name: str, errors: type[Exception], number: int, last: bool) -> None:
        self.name, self.errors, self.number, self.last, self.done = name, errors, number, last, False

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            self.done = True
            return False
        if not isinstance(error, (AgainError, ShortReadError, OSError, self.errors)):
            return False
        if self.last:
            why = " ".join(str(error).split())[:200] or type(error).__name__
            raise CheckpointError(f"{self.name}: the hub was tried {self.number + 1} times: {why}; try later") from None
        after = error.after if isinstance(error, AgainError) else None
        time.sleep(min(after, LONGEST) if after is not None else PAUSE * 2**self.number)
        return True


def patiently(name: str, errors: type[Exception], tries: int = 0) -> Iterator[Attempt]:
    """Up to `tries` (default: TRIES) attempts; leave the loop when one is done."""
    tries = tries or TRIES
    for number in range(tries):
        yield Attempt(name, errors, number, number + 1 == tries)


def refusal(name: str, status: int, headers: Mapping[str, str]) -> Exception:
    """What a status means: something to try again, or the end."""
    if status in _AGAIN:
        text = headers.get("retry-after", "")
        after = float(text) if re.fullmatch(r"\d{1,6}(\.\d+)?", text) else None
        return AgainError(f"status {status}" + (" (too many requests)" if status == 429 else ""), after)
    words = {
        401: "the hub wants a login (401); log in with `hf auth login`, or set HF_TOKEN",
        403: "the hub refuses access (403); ask for it on the model's page, and log in with `hf auth login`",
        404: "is not on the hub (404)",
    }
    return Refused(f"{name}: {words.get(status, f'the server answered with status {status}')}", status)
