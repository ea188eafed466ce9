"""What came from servers and may not be in an output yet, in memory that outlives a process that is killed.

A ring in the system's shared memory, and so on no disk: what is fetched goes into it, and stays until newer bytes need
the room, which is when the output has long been made of it. A rerun takes from it what its killed run had fetched.
How much came is seen without a note of it: behind each block stands a mark, which what comes next writes over.
It is readable by its user alone, locked while in use, and named for the staging folder of the job; it ends with the
process unless that is killed, and the next job removes those whose job is gone or a day old. After a power cut there is
nothing.
"""

import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PLACE = Path("/dev/shm")
ROOM = 48 << 20  # bytes: what is asked for ahead, the tiles under way, and some room between
_ENTRIES = 256
_GRAIN = 8  # bytes of the largest number
_HEAD = 1 << 15  # bytes before the ring: where it goes on, whose it is, and the entries
BLOCK = 1 << 16  # bytes
_MARK = bytes.fromhex("9d3ae1c74bf20865")  # bytes that are the same by chance count as not come
_ENTRY = struct.Struct("<32sqqqqq")  # file, first byte in it, size, place, size once all came, 1 if it holds
_FILLED, _HOLDS = 32 + 24, 32 + 32  # where in an entry
_TABLE = 1 << 12
_NUMBER = struct.Struct("<q")
_DAY = 86_400.0


@dataclass
class SharedPiece:
    """Bytes [start, start + size) of a file on a server.

    memory: For them, to be filled from the first to the last. filled: All of them, or what a killed run had of them.
    """

    ring: "SharedRing"
    number: int
    file: bytes
    start: int
    size: int
    place: int
    filled: int = 0
    used: bool = True

    @property
    def memory(self) -> memoryview:
        return self.ring.bytes[self.place : self.place + self.size]

    def came(self) -> None:
        """All of them are there."""
        self.filled = self.size
        self.ring.note(self.number, _FILLED, self.size)

    def mark(self) -> None:
        """None of them is there."""
        for end in self._ends():
            self.ring.bytes[end : end + len(_MARK)] = _MARK

    def marked(self) -> int:
        """How many are there, in whole blocks: up to the first mark that stands."""
        came = 0
        for end in self._ends():
            if self.ring.bytes[end : end + len(_MARK)] == _MARK:
                break
            came = end - self.place
        return came

    def _ends(self) -> range:
        """Where blocks end and a mark has room."""
        return range(self.place + BLOCK, self.place + self.size - len(_MARK) + 1, BLOCK)

    def release(self) -> None:
        """Nobody reads it any more; what it holds stays until its memory is needed."""
        self.used = False


class SharedRing:
    """The pieces of one job.

    Args:
        handle: A file of `_HEAD + ROOM` bytes in shared memory, which this process has locked.
    """

    def __init__(self, handle: int) -> None:
        self._map = mmap.mmap(handle, _HEAD + ROOM)
        self._whole = memoryview(self._map)
        self.bytes = self._whole[_HEAD:]
        self._lock = threading.Lock()
        self._next = _NUMBER.unpack_from(self._map, 0)[0] % ROOM
        self._pieces: dict[int, SharedPiece] = {}
        for number in range(_ENTRIES):
            file, start, size, place, filled, holds = _ENTRY.unpack_from(self._map, _TABLE + number * _ENTRY.size)
            if holds == 1 and 0 < size and 0 <= place <= ROOM - size and filled in (0, size):
                piece = SharedPiece(self, number, file, start, size, place, filled, used=False)
                piece.filled = filled or piece.marked()
                self._pieces[number] = piece

    def note(self, number: int, field: int, value: int) -> None:
        _NUMBER.pack_into(self._map, _TABLE + number * _ENTRY.size + field, value)

    def take(self, file: bytes, start: int, size: int) -> SharedPiece | None:
        """Memory for some bytes of a file; None where what lies there is still being read."""
        with self._lock:
            if (room := self._find(size + _GRAIN)) is None:
                return None
            place, over = room
            place += (start - place) % _GRAIN  # where numbers lie even in the file, they do here
            for piece in over:
                self._drop(piece)
            if len(self._pieces) == _ENTRIES:
                idle = [piece for piece in self._pieces.values() if not piece.used]
                if not idle:
                    return None
                self._drop(min(idle, key=lambda piece: (piece.place - place) % ROOM))
            number = next(n for n in range(_ENTRIES) if n not in self._pieces)
            piece = self._pieces[number] = SharedPiece(self, number, file, start, size, place)
            _ENTRY.pack_into(self._map, _TABLE + number * _ENTRY.size, file, start, size, place, 0, 0)
            piece.mark()
            self.note(number, _HOLDS, 1)
            self._next = place + size
            _NUMBER.pack_into(self._map, 0, self._next)
            return piece

    def _find(self, size: int) -> tuple[int, list[SharedPiece]] | None:
        """Where the ring has room for `size` bytes that nobody reads, and what it holds there."""
        place, rounds = self._next, 0
        while rounds < 2 and size <= ROOM // 4:
            if place + size > ROOM:
                place, rounds = 0, rounds + 1
            over = [p for p in self._pieces.values() if p.place < place + size and place < p.place + p.size]
            if not any(piece.used for piece in over):
                return place, over
            place = max(piece.place + piece.size for piece in over if piece.used)
        return None

    def _drop(self, piece: SharedPiece) -> None:
        self.note(piece.number, _HOLDS, 0)
        del self._pieces[piece.number]

    def copy(self, file: bytes, start: int, size: int) -> list[tuple[int, bytes]]:
        """What it holds of `size` bytes of a file: where behind `start`, and a copy; in order and apart."""
        parts, at = [], start
        with self._lock:
            for piece in sorted(self._pieces.values(), key=lambda piece: piece.start):
                first, last = max(at, piece.start), min(start + size, piece.start + piece.filled)
                if piece.file == file and first < last:
                    place = piece.place - piece.start
                    parts.append((first - start, bytes(self.bytes[place + first : place + last])))
                    at = last
        return parts


_current: SharedRing | None = None


def current() -> SharedRing | None:
    """The ring of the job that runs in this process; None where there is none."""
    return _current


def file_key(name: str, version: str, size: int) -> bytes:
    """What a file's pieces are known by: one state of one file."""
    return hashlib.sha256(f"{name}\0{version}\0{size}".encode()).digest()


@contextlib.contextmanager
def keeping(staging: Path, remote: bool = True) -> Iterator[None]:
    """While inside, what is fetched is kept for a rerun of the job of a staging folder; a process that ends itself
    takes it along, however it ends.

    remote: Whether anything will be fetched.

    Where the system has no shared memory, or too little, nothing is kept.
    """
    global _current
    handle = _open(staging) if remote and _current is None else None
    if handle is None:
        yield
        return
    _sweep()
    try:
        _current = SharedRing(handle)
        yield
    finally:
        _current = None
        _path(staging).unlink(missing_ok=True)  # threads may still write there: nobody else is given that memory
        os.close(handle)


def _path(staging: Path) -> Path:
    return PLACE / f"lapis-{os.geteuid()}-{hashlib.sha256(os.fsencode(staging)).hexdigest()[:24]}"


def _open(staging: Path) -> int | None:
    """The locked file of a ring, made if it is not there; None where it cannot be had."""
    try:
        handle = os.open(_path(staging), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return None
    try:
        about = os.fstat(handle)
        name = os.fsencode(staging)
        if about.st_uid != os.geteuid() or about.st_nlink != 1 or len(name) > _TABLE - 16:
            raise OSError
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(handle, 0, _HEAD + ROOM)  # too little memory shows here, and not by a signal
        os.pwrite(handle, _NUMBER.pack(len(name)) + name, 8)
    except OSError:
        os.close(handle)
        return None
    return handle


def _sweep() -> None:
    """Removes rings of this user whose job is gone, or was left a day ago."""
    for path in PLACE.glob(f"lapis-{os.geteuid()}-*"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            head = file.read(_TABLE)
            size = _NUMBER.unpack_from(head, 8)[0] if len(head) == _TABLE else 0
            staging = os.fsdecode(head[16 : 16 + size])
            if not staging or not os.path.isdir(staging) or path.stat().st_mtime < time.time() - _DAY:
                path.unlink()
