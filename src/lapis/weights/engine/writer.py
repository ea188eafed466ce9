"""Writes a file from its start to its end, past the page cache where the file system allows it.

A model's worth of freshly written pages pushes everything else out of memory, the inputs that are still to be read
among them, and making those pages costs more than the disk does. Direct writes need aligned memory, offsets and sizes:
bytes are gathered in blocks, and one block is written while the next is filled. Leaves out: fsync, which a commit does.
"""

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lapis.checkpoint.staging import note_once

BLOCK = 4 << 20
_ALIGNED = 4096  # what any disk's direct writes are content with


class Writer:
    """A file of `end` bytes whose space is reserved at once, filled in order from byte `start` on.

    at_once: Each write is with the system when it returns, and survives this process.
    within: The file is longer, and others write what is before and behind: no byte of theirs is touched.

    Raises OSError where there is no room, or where an earlier block could not be written.
    """

    def __init__(self, path: Path, end: int, start: int = 0, *, at_once: bool = False, within: bool = False) -> None:
        self._end, self._name, self._at_once, self._within = end, str(path), at_once, within
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not within:
            _reserve(self._handle, end)
        self._direct = None if at_once or within else _direct(path)
        self._at = start if at_once or within else start - start % _ALIGNED  # of the block that is being filled
        self._fill = start - self._at
        self._block: mmap.mmap | None = None
        self._spare: mmap.mmap | None = None
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
            if self._block is None:
                self._block, self._spare = mmap.mmap(-1, BLOCK), mmap.mmap(-1, BLOCK)
                self._restore(self._block)
            now = min(BLOCK - self._fill, len(data))
            self._block[self._fill : self._fill + now] = data[:now]
            self._fill += now
            data = data[now:]
            if self._fill == BLOCK:
                self._send()

    def _restore(self, block: mmap.mmap) -> None:
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
            if self._block is not None:
                self._send()
                self._wait()
            # the last block was rounded up, now or by a run that was killed before it came here
            if not self._within:
                os.ftruncate(self._handle, self._end)
        finally:
            self._pool.shutdown()
            os.close(self._handle)
            if self._direct is not None:
                os.close(self._direct)
            for block in (self._block, self._spare):
                if block is not None:
                    block.close()

    def _send(self) -> None:
        self._wait()
        assert self._block is not None
        self._flight = self._pool.submit(self._put, self._block, self._fill, self._at)
        self._block, self._spare = self._spare, self._block
        self._at, self._fill = self._at + self._fill, 0

    def _wait(self) -> None:
        if self._flight is not None:
            self._flight.result()
            self._flight = None

    def _put(self, block: mmap.mmap | memoryview, size: int, offset: int) -> None:
        with memoryview(block) as whole:
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
