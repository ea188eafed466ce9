"""Writes a file from its start to its end, past the page cache where the file system allows it.

A model's worth of freshly written pages pushes everything else out of memory, the inputs that are still to be read
among them, and making those pages costs more than the disk does. Direct writes need aligned memory, offsets and sizes:
bytes are gathered in blocks, and one block is written while the next is filled. Blocks can lie in the memory of a file,
which outlives a process that is killed. Leaves out: fsync, which a commit does.
"""

import errno
import mmap
import os
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from lapis.checkpoint.staging import note_once

BLOCK = 4 << 20
_ALIGNED = 4096  # what any disk's direct writes are content with
_PLACE = struct.Struct("<qq")  # of a block in its file: where it begins, and how much of it is filled


class Writer:
    """A file of `end` bytes whose space is reserved at once, filled in order from byte `start` on.

    blocks: A file for the blocks on their way: what was written survives this process, and `recover` puts it in place.
    within: The file is longer, and others write what is before and behind: no byte of theirs is touched.

    Raises OSError where there is no room, or where an earlier block could not be written.
    """

    def __init__(
        self, path: Path, end: int, start: int = 0, *, blocks: Path | None = None, within: bool = False
    ) -> None:
        self._end, self._name, self._within = end, str(path), within
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not within:
            _reserve(self._handle, end)
        self._direct = None if within else _direct(path)
        self._at_once = within or (blocks is not None and self._direct is None)
        self._at = start if self._at_once else start - start % _ALIGNED  # of the block that is being filled
        self._start, self._fill = start, start - self._at
        self._file = blocks
        self._blocks: _Blocks | None = None
        self._turn = 0  # which of the two is being filled
        self._pool = ThreadPoolExecutor(1)
        self._flight: Future[None] | None = None

    def write(self, data: memoryview | bytes) -> None:
        """The next bytes of the file; they may be changed after the call."""
        data = memoryview(data)
        if self._at_once:
            self._put(data, len(data), self._at)
            self._at += len(data)
            return
        while data:
            if self._blocks is None:
                self._blocks = _Blocks(self._file)
                self._restore(self._blocks.memory[0])
            now = min(BLOCK - self._fill, len(data))
            self._blocks.memory[self._turn][self._fill : self._fill + now] = data[:now]
            self._fill += now
            self._blocks.mark(self._turn, self._at, self._fill)
            data = data[now:]
            if self._fill == BLOCK:
                self._send(self._blocks)

    def _restore(self, block: memoryview) -> None:
        """What an earlier run wrote of the block that is being filled."""
        done = 0
        while done < self._fill:
            part = os.pread(self._handle, self._fill - done, self._at + done)
            if not part:
                raise OSError(errno.EIO, "is shorter than it was", self._name)
            block[done : done + len(part)] = part
            done += len(part)

    def close(self) -> None:
        """Writes what is left; the file then has its size."""
        try:
            if self._blocks is not None:
                self._send(self._blocks)
                self._wait()
            # the last block was rounded up, now or by a run that was killed before it came here
            if not self._within:
                os.ftruncate(self._handle, self._end)
            else:
                begin_writing(self._handle, self._start, self._at)
        finally:
            self._pool.shutdown()
            os.close(self._handle)
            if self._direct is not None:
                os.close(self._direct)
            if self._blocks is not None:
                self._blocks.close()

    def _send(self, blocks: "_Blocks") -> None:
        self._wait()
        self._flight = self._pool.submit(self._put, blocks.memory[self._turn], self._fill, self._at)
        self._turn = 1 - self._turn
        self._at, self._fill = self._at + self._fill, 0

    def _wait(self) -> None:
        if self._flight is not None:
            self._flight.result()
            self._flight = None

    def _put(self, whole: memoryview, size: int, offset: int) -> None:
        if self._direct is not None:
            padded = -(-size // _ALIGNED) * _ALIGNED
            try:
                if os.pwrite(self._direct, whole[:padded], offset) == padded:
                    return
            except OSError as error:
                if error.errno != errno.EINVAL:  # this file system wants another alignment
                    raise
        done = 0
        while done < size:
            done += os.pwrite(self._handle, whole[done:size], offset + done)


class _Blocks:
    """Two blocks of memory; with a path they are that file's, each with its place, and outlive this process."""

    def __init__(self, path: Path | None) -> None:
        size = _ALIGNED + 2 * BLOCK
        if path is None:
            self._map = mmap.mmap(-1, size)
        else:
            with path.open("wb+") as file:
                file.write(bytes(size))  # a full disk shows here, and not by a signal when memory is touched
                file.flush()
                self._map = mmap.mmap(file.fileno(), size)
        self._whole = memoryview(self._map)
        self.memory = [self._whole[_ALIGNED + i * BLOCK :][:BLOCK] for i in range(2)]

    def mark(self, number: int, at: int, fill: int) -> None:
        """Says that block `number` holds `fill` bytes of the file, from byte `at` on."""
        _PLACE.pack_into(self._map, number * _PLACE.size, at, fill)

    def close(self) -> None:
        for view in (*self.memory, self._whole):
            view.release()
        self._map.close()


def begin_writing(handle: int, first: int, last: int) -> None:
    """Lets the disk begin with bytes that are in memory, so that an fsync finds little to wait for."""
    if hasattr(os, "posix_fadvise") and first < last:
        os.posix_fadvise(handle, first, last - first, os.POSIX_FADV_DONTNEED)


def recover(path: Path, blocks: Path) -> None:
    """Puts into a file what a process that was killed had written of it, and its disk had not yet.

    Whether those bytes are right is for a digest to say: nothing is known of them after a power cut.
    """
    with suppress(FileNotFoundError):
        raw = memoryview(blocks.read_bytes())
        if len(raw) == _ALIGNED + 2 * BLOCK:
            with path.open("rb+") as file:
                for number in range(2):
                    at, fill = _PLACE.unpack_from(raw, number * _PLACE.size)
                    file.seek(max(0, at))
                    file.write(raw[_ALIGNED + number * BLOCK :][: max(0, min(fill, BLOCK))])


def _reserve(handle: int, end: int) -> None:
    """Space for the whole file, where the file system can promise it; else the file is only as long as it grows."""
    try:
        os.posix_fallocate(handle, 0, end)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        note_once("this file system cannot reserve space; a disk that fills up shows only when it is full")


def _direct(path: Path) -> int | None:
    """A handle for direct writes, where they are to be had."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
    except AttributeError:
        return None
    except OSError:
        note_once("this file system has no direct writes; what else is in memory gives way to the output")
        return None
