"""A file on a server, read in ranges: what will be read soon is asked for early, in large pieces, several at a time.

Whoever reads says what comes next (`prefetch`); what adjoins becomes one request. A piece is held until all of it was
read and then dropped, so that memory is what was asked for and not read yet, which the reader bounds. Every answer is
checked (connections.py, stores.py); one that breaks off goes on where it stopped. Where a sha256 of the file is known
and every byte was read, it must agree. What a killed run had fetched is not fetched again (shared_memory.py).
"""

import bisect
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from lapis.checkpoint.remote import shared_memory
from lapis.checkpoint.remote.digest import FileDigest
from lapis.checkpoint.remote.requests import QUICK, ShortReadError, patiently
from lapis.checkpoint.remote.shared_memory import SharedPiece
from lapis.checkpoint.tensor_file import Header, parse_header
from lapis.errors import CheckpointError

FIRST = 1 << 16  # bytes of a file that are asked for first: most headers are in them
PIECE = 1 << 20  # bytes of a request at most; whoever reads waits for the whole of one
LARGE = 4  # pieces in a request to a server that answers at once: what is left of its cost is each request's
NEAR = 1 << 18  # bytes that are asked for where fewer are read that nobody announced: neighbors are read next
GAP = 1 << 14  # bytes that nobody wants, between two ranges that are asked for as one
CONNECTIONS = 12  # requests at a time, of all files together
FEW = 4  # to servers that answer at once: more would wait for each other's turn on the processor
AHEAD = 16 << 20  # bytes asked for before they are read, where a file is read from its start to its end
NEARBY = 16  # pieces of all files together that nobody announced and that are kept after they were read


class ByteRanges(Protocol):
    """Where the bytes are: one try to read some of them.

    read(first, buffer): Fills `buffer` from byte `first` on, in order; returns how many bytes came. Raises what
    `checkpoint/remote/requests.py` tells apart: what may pass, and what does not.
    """

    name: str
    size: int
    delay: float  # seconds that it takes to answer, the least so far

    def read(self, first: int, buffer: memoryview) -> int: ...


class DigestMismatch(CheckpointError):
    """All bytes of a file were read, and they are others than its server lists."""


class RangePiece:
    """Bytes [start, end) of a file, on their way.

    left: bytes that somebody said to read and did not read yet. readers: how many are at it.
    nearby: whether nobody announced it.
    """

    def __init__(self, start: int, end: int, nearby: bool = False) -> None:
        self.start, self.end, self.left, self.nearby = start, end, end - start, nearby
        self.readers = 0
        self.ready = threading.Event()
        self.data = memoryview(b"")
        self.shared: SharedPiece | None = None  # where `data` lies, if it outlives this process
        self.error: BaseException | None = None


class RemoteFile:
    """One file.

    Args:
        place: Where it is.
        sha256: What its bytes must have, where that is known.

    Attributes:
        received: Bytes that came over the network so far.
        delivered: Bytes that were read by whoever wanted them.
        digest: How far its sha256 is; None where there is none to agree with.
        version: Names this state of the file, for a later run: its digest, or where it lies with what its server says.
    """

    def __init__(self, place: ByteRanges, sha256: str = "", version: str = "") -> None:
        self.name, self.size, self.sha256 = place.name, place.size, sha256
        self.received = self.delivered = 0
        self.digest = FileDigest(self.size) if sha256 else None
        self.version = version
        self._key = shared_memory.file_key(self.name, sha256 or version, self.size)
        self._place = place
        self._pieces: list[RangePiece] = []  # by start; they do not overlap
        self._growing: RangePiece | None = None  # the last one, not asked for yet: what comes next may adjoin
        self._lock = threading.Lock()

    @property
    def connections(self) -> int:
        """How many requests there are at a time, as far as they are of this file's server."""
        return FEW if self._place.delay < QUICK else CONNECTIONS

    def prefetch(self, start: int, size: int) -> None:
        """These bytes will be read soon, once; returns at once."""
        with self._lock:
            for first, last in self._missing(start, min(start + size, self.size)):
                self._announce(first, last)
                if last == self.size:  # nothing follows
                    self._send_growing()

    def send(self) -> None:
        """Nothing that adjoins will be announced: what was is asked for now."""
        with self._lock:
            self._send_growing()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills `buffer` with the bytes from `start` on. Thread-safe.

        Raises:
            CheckpointError: Where they cannot be had, or the whole file is another than its server lists.
        """
        if start + len(buffer) > self.size:
            raise CheckpointError(f"{self.name}: has {self.size:,} bytes; there is nothing at {start + len(buffer):,}")
        done = 0
        while done < len(buffer):
            piece = self._piece_at(start + done, start + len(buffer))
            piece.ready.wait()
            part = piece.data[start + done - piece.start :][: len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)
            self._leave(piece, len(part))
            if piece.error is not None:
                raise piece.error
        self.saw(start, buffer)

    @contextmanager
    def lent(self, start: int, size: int) -> Iterator[memoryview]:
        """The bytes from `start` on where they lie, while inside; a copy where they came by several requests.

        Raises:
            CheckpointError: As `read_into`.
        """
        piece = self._piece_at(start, start + size)
        piece.ready.wait()
        part = piece.data[start - piece.start :][:size]
        if len(part) < size:
            self._leave(piece, 0)
            if piece.error is not None:
                raise piece.error
            part = memoryview(bytearray(size))
            self.read_into(start, part)
            yield part
            return
        try:
            self.saw(start, part)
            yield part
        finally:
            self._leave(piece, size)

    def saw(self, start: int, piece: memoryview) -> None:
        """Takes note of bytes from `start` on, for the digest. Raises DigestMismatch where it is complete and wrong."""
        if self.digest is None:
            return
        self.digest.update(start, piece)
        if (digest := self.digest.hexdigest()) is not None and digest != self.sha256:
            raise DigestMismatch(
                f"{self.name}: all of it was read, and its sha256 is {digest[:16]} where the server lists "
                f"{self.sha256[:16]}; nothing of it is kept, run again"
            )

    def header(self, path: Path) -> Header:
        """Its checked header, where it is a safetensors file, by one or two requests. path: what it is called."""
        raw = self.fetch(0, min(FIRST, self.size))

        def more(first: int, last: int) -> bytes:
            nonlocal raw
            if last > len(raw):
                raw += self.fetch(len(raw), last)
            return raw[first:last]

        header = parse_header(path, self.size, more)
        self.saw(0, memoryview(raw)[: 8 + len(header.raw)])
        return header

    def fetch(self, first: int, last: int) -> bytes:
        """The bytes [first, last), asked for now and not kept."""
        data = bytearray(last - first)
        self._fill(first, memoryview(data))
        return bytes(data)

    def blocks(self, start: int) -> Iterator[memoryview]:
        """All bytes from `start` on, in order; some are asked for early. A block is good until the next is taken."""
        announced, block = start, bytearray(PIECE)
        for first in range(start, self.size, PIECE):
            while announced < min(first + AHEAD, self.size):
                self.prefetch(announced, PIECE)
                announced += PIECE
            part = memoryview(block)[: min(PIECE, self.size - first)]
            self.read_into(first, part)
            yield part

    def forget(self) -> None:
        """What was announced will not be read."""
        with self._lock:
            self._pieces, self._growing = [], None

    def _missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts of [start, end) that no piece has; those that one has will be read once more."""
        parts, at = [], start
        number = bisect.bisect_right(self._pieces, start, key=_start)
        for piece in self._pieces[max(0, number - 1) :]:
            if piece.start >= end:
                break
            if piece.start > at:
                parts.append((at, piece.start))
            piece.left += max(0, min(end, piece.end) - max(at, piece.start))
            at = max(at, piece.end)
        return [*parts, (at, end)] if at < end else parts

    def _announce(self, first: int, last: int) -> None:
        """Adds [first, last), which no piece has, to the piece that it adjoins, or to new ones."""
        growing, most = self._growing, LARGE * PIECE if self._place.delay < QUICK else PIECE
        if growing is not None and 0 <= first - growing.end <= GAP and last - growing.start <= most:
            growing.end, growing.left = last, growing.left + last - first
            return
        for start in range(first, last, most):
            self._send_growing()
            self._growing = self._insert(RangePiece(start, min(start + most, last)))

    def _insert(self, piece: RangePiece) -> RangePiece:
        bisect.insort(self._pieces, piece, key=_start)
        return piece

    def _send_growing(self) -> None:
        if self._growing is not None:
            _fetchers.put(self, self._growing)
            self._growing = None

    def _piece_at(self, at: int, end: int) -> RangePiece:
        """The piece with byte `at`; where nobody announced it, one that is fetched here and now."""
        with self._lock:
            number = bisect.bisect_right(self._pieces, at, key=_start)
            before = self._pieces[number - 1] if number else None
            if before is not None and before.end > at:
                if before is self._growing:
                    self._send_growing()
                before.readers += 1
                return before
            following = self._pieces[number].start if number < len(self._pieces) else self.size
            piece = self._insert(RangePiece(at, min(max(end, at + NEAR), at + PIECE, following), nearby=True))
            piece.readers += 1
        self.load(piece)
        _nearby.append((self, piece))
        while len(_nearby) > NEARBY:
            file, old = _nearby.popleft()
            file._release(old)
        return piece

    def load(self, piece: RangePiece) -> None:
        """Fetches a piece, unless it was forgotten; whoever waits for it then has its bytes, or its error."""
        if piece.readers or piece in self._pieces:
            size = piece.end - piece.start
            try:
                if (ring := shared_memory.current()) is not None:
                    piece.shared = ring.take(self._key, piece.start, size)
                buffer = _buffers.take(size) if piece.shared is None else piece.shared.memory
                self._fill_rest(piece, buffer, [] if ring is None else ring.copy(self._key, piece.start, size))
                piece.data = buffer
            except BaseException as error:
                piece.error = error
        piece.ready.set()

    def _fill_rest(self, piece: RangePiece, buffer: memoryview, there: list[tuple[int, bytes]]) -> None:
        """Fetches what of a piece is not there yet; fills its memory from the first byte to the last."""
        done = 0
        for first, data in [*there, (len(buffer), b"")]:
            if done < first:
                self._fill(piece.start + done, buffer[done:first])
            done = first + len(data)
            buffer[first:done] = data
        if piece.shared is not None:
            piece.shared.came()

    def _leave(self, piece: RangePiece, size: int) -> None:
        """One reader has read a part. Drops a piece once all of it was read, or where it could not be had."""
        with self._lock:
            self.delivered += size
            piece.left -= size
            piece.readers -= 1
        if piece.error is not None or (piece.left <= 0 and not piece.nearby):
            self._release(piece)

    def _release(self, piece: RangePiece) -> None:
        """Drops a piece; its memory is used again unless somebody is still at it."""
        with self._lock:
            if piece not in self._pieces:
                return
            self._pieces.remove(piece)
            if not piece.readers and piece.ready.is_set():
                if piece.shared is None:
                    _buffers.give(piece.data)
                else:
                    piece.shared.release()

    def _fill(self, first: int, buffer: memoryview) -> None:
        """Fills `buffer`, by as many requests as it takes."""
        done = 0
        for attempt in patiently(self.name):
            with attempt:
                now = self._place.read(first + done, buffer[done:])
                attempt.useful = now > 0
                done += now
                self.received += now
                if done < len(buffer):
                    raise ShortReadError(f"{now:,} of {len(buffer) - done + now:,} bytes came")
            if attempt.done:
                return


class _Buffers:
    """Memory of pieces that was read and can be filled again: making its pages anew costs as much as filling them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spare: dict[int, list[memoryview]] = {}

    def take(self, size: int) -> memoryview:
        whole = PIECE if size <= PIECE else LARGE * PIECE
        if size <= whole // 2:
            return memoryview(bytearray(size))
        with self._lock:
            spare = self._spare.get(whole)
            memory = spare.pop() if spare else memoryview(bytearray(whole))
        return memory[:size]

    def give(self, buffer: memoryview) -> None:
        memory: Any = buffer.obj
        if len(memory) in (PIECE, LARGE * PIECE):
            with self._lock:
                spare = self._spare.setdefault(len(memory), [])
                if len(spare) < AHEAD // len(memory):
                    spare.append(memoryview(memory))


class _Fetchers:
    """A few threads that load pieces in the order in which they were asked for."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Without any thread, as a child finds itself after a fork."""
        self._lock, self._threads = threading.Lock(), 0
        self._waiting: SimpleQueue[tuple[RemoteFile, RangePiece]] = SimpleQueue()

    def put(self, file: RemoteFile, piece: RangePiece) -> None:
        self._waiting.put((file, piece))
        with self._lock:
            if self._threads < file.connections and self._waiting.qsize():
                threading.Thread(target=self._work, daemon=True, name="lapis-ranges").start()
                self._threads += 1

    def _work(self) -> None:
        while True:
            file, piece = self._waiting.get()
            file.load(piece)
            with self._lock:
                if self._threads > file.connections:
                    self._threads -= 1
                    return


def _start(piece: RangePiece) -> int:
    return piece.start


_fetchers = _Fetchers()
_buffers = _Buffers()
_nearby: deque[tuple[RemoteFile, RangePiece]] = deque()
os.register_at_fork(after_in_child=_fetchers.begin)
