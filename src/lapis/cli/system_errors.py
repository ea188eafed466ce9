"""Errors of the operating system, of memory and of an installation as one line: what, path, what it means, remedy.

Refusals of lapis' own are LapisError and are lines already. What is neither is a bug, and keeps its traceback.
"""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

_RUN_AGAIN = "then run the same command again"
_FULL = f"the disk or the quota is full; make room, {_RUN_AGAIN}"
_DISK = f"the disk or its connection reports an error; see to that (dmesg tells more), {_RUN_AGAIN}"
_RIGHTS = "this user must not do that there; check owner and permissions, or give another place"
_ABSENT = "it is not there, or no longer; check the path"
_FEW_HANDLES = f"the limit of open files is reached; raise it (ulimit -n 4096), {_RUN_AGAIN}"
_NOT_THERE = "this file system or kernel cannot do that; give a place on another disk"
_NETWORK = f"the network or the other machine does not answer; check it, {_RUN_AGAIN}"
_MEMORY = "free some, or take a smaller model, batch or context"

MEANINGS = {
    errno.EIO: _DISK, errno.ESTALE: _DISK, errno.EREMOTEIO: _DISK, errno.ENODEV: _DISK, errno.ENXIO: _DISK,
    errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL,
    errno.EACCES: _RIGHTS, errno.EPERM: _RIGHTS, errno.EROFS: _RIGHTS,
    errno.ENOENT: _ABSENT, errno.ENOTDIR: _ABSENT, errno.ELOOP: _ABSENT,
    errno.EISDIR: "it is a folder and not a file; give the file",
    errno.ENAMETOOLONG: "the name is too long for this file system; give a shorter one",
    errno.EMFILE: _FEW_HANDLES, errno.ENFILE: _FEW_HANDLES,
    errno.EXDEV: _NOT_THERE, errno.ENOLCK: _NOT_THERE, errno.EOPNOTSUPP: _NOT_THERE, errno.ENOSYS: _NOT_THERE,
    errno.EINVAL: _NOT_THERE,
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: f"the limit of processes or threads is reached; end some (ulimit -u), {_RUN_AGAIN}",
    errno.EBUSY: f"another process uses it; wait for it, {_RUN_AGAIN}",
    errno.ETXTBSY: f"another process uses it; wait for it, {_RUN_AGAIN}",
}  # fmt: skip
_OF_RUST = re.compile(r"\(os error (\d+)\)")  # tokenizers and safetensors say it so, in exceptions of their own
_OF_TORCH = re.compile(r"can't allocate memory|Cannot allocate memory|CUDA out of memory")
_REFUSED_SIZE = re.compile(r"tried to allocate ([\d.]+ \w+)", re.IGNORECASE)


def system_error(error: BaseException) -> str | None:
    """The line for an error that is none of lapis' own; None where it is a bug."""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OF_TORCH.search(str(error))):
        size = _REFUSED_SIZE.search(str(error))
        return f"{_place(error)}out of memory{f' ({size[1]} more were needed)' if size else ''}; {_MEMORY}"
    if isinstance(error, RecursionError):
        return f"{_place(error)}something in it is nested too deeply to be read; flatten it, or fetch the file again"
    if isinstance(error, OSError):
        return _from_number(error, error.errno, error.strerror or str(error))
    if isinstance(error, ImportError):
        return f"{error}; a part of the installation cannot be loaded, install lapis again"
    if match := _OF_RUST.search(str(error)):
        return _from_number(error, int(match[1]), os.strerror(int(match[1])))
    return None


def _from_number(error: BaseException, number: int | None, text: str) -> str:
    meaning = MEANINGS.get(number or 0)
    if meaning is None:
        meaning = _NETWORK if isinstance(error, ConnectionError | TimeoutError) else f"see to that, {_RUN_AGAIN}"
    return f"{_place(error)}{text}; {meaning}"


def _place(error: BaseException) -> str:
    """The path that the error names, or the one that the code had in hand, as the beginning of a line."""
    if isinstance(error, OSError) and error.filename is not None:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        if names:
            return f"{' -> '.join(names)}: "
    return next((f"{path}: " for path in _paths_in_hand(error.__traceback__)), "")


def _paths_in_hand(trace: TracebackType | None) -> Iterator[Path]:
    """Paths among the local variables of the functions that were running, the innermost function first.

    A call on an open file names no path in its error; the function that made the call knows it, or what it reads from.
    """
    frames = []
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        values = list(frame.f_locals.values())
        within = [vars(value).get(name) for value in values if hasattr(value, "__dict__") for name in ("file", "path")]
        yield from (value for value in [*values, *within] if isinstance(value, Path))
