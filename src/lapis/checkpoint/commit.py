"""The one way anything is written: whole, or not at all.

An output is built in a staging folder beside it (staging.py). At the end every file is fsynced, a manifest with sizes
and sha256 is written, the folder is sealed and renamed into place; only then is the rest dropped. Until the rename
nothing at the output path is loadable, and a kill before it finds the job's journal as it was.
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lapis.checkpoint.staging import (
    BUILD,
    REPLACED,
    JobName,
    Staging,
    claim,
    disk_errors,
    drop,
    lock,
    note_once,
    seal,
    staging_of,
    sweep_finished,
    sync,
)
from lapis.errors import OutputError

MANIFEST = "lapis-manifest.json"
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def commit(
    out: Path | str,
    *,
    kind: str = "output",
    job: JobName | None = None,
    overwrite: bool = False,
    needs_bytes: int = 0,
    inputs: Iterable[Path | str] = (),
    resumable: bool = False,
) -> Iterator[Staging]:
    """Builds a folder and puts it at `out` in one step when the block ends without an error.

    Args:
        out: The output folder. Parents are made.
        kind: What is being made, for people ("training", "merge"). What another kind of job left is never touched.
        job: Which job of that kind, where it goes on with what was interrupted; another's is never touched.
        overwrite: Swap an existing folder for the new one, whole; the new one has its permissions.
        needs_bytes: Refuse now if the disk has less.
        inputs: Folders that are read; `out` must not be one of them.
        resumable: On failure keep what is there for a rerun.

    Raises:
        OutputError: Before any work, for an output that exists, is an input, is locked, or cannot be written, and for
            a staging folder that another job or another user left.
    """
    out = Path(os.path.abspath(out))
    check_output(out, overwrite=overwrite, inputs=inputs)
    root = staging_of(out)
    handle = lock(root)
    try:
        claim(root, kind, job)
    except BaseException:
        os.close(handle)
        raise
    staging = Staging(root / BUILD, root)
    try:
        if not resumable:
            _empty(staging.path)
        check_space(out, needs_bytes - _allocated(staging.path))
        with disk_errors(out):
            yield staging
            _seal(staging)
            _move(staging, out, overwrite)
    except BaseException:
        if not resumable or staging.useless or staging.fresh:
            shutil.rmtree(root, ignore_errors=True)
        raise
    finally:
        os.close(handle)


@contextmanager
def commit_file(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Writes one file and puts it at `path` in one step. Yields the temporary path to write to."""
    path = Path(os.path.abspath(path))
    check_file(path, overwrite=overwrite)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_temporary(path)
        temporary = path.with_name(f".{path.name[:200]}.lapis-{secrets.token_hex(8)}")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield temporary
            sync(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        try:
            sync(path.parent)
        except OSError as error:
            note_once(f"{path} is complete, but its folder could not be synced ({error.strerror})")


def _sweep_temporary(path: Path) -> None:
    """Removes what killed writers of this file left; those at work hold a lock on theirs."""
    for left in path.parent.glob(f".{glob.escape(path.name[:200])}.lapis-*"):
        with suppress(OSError):
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(handle)


def check_output(
    out: Path, *, overwrite: bool = False, inputs: Iterable[Path | str] = (), option: str = "--out"
) -> None:  # fmt: skip
    """Raises OutputError where `out` must not be written: it is (in) an input, it exists, or its place is read-only.

    What a killed job that had finished `out` left beside it is cleared away first. option: what names it on the command
    line.
    """
    sweep_finished(Path(os.path.abspath(out)))
    real = Path(os.path.realpath(out))
    for source in inputs:
        other = Path(os.path.realpath(source))
        if real.is_relative_to(other) or other.is_relative_to(real):
            raise OutputError(f"{out}: is the input {source}, or lies within it; give another {option}")
    if os.path.lexists(out) and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out}: exists already; give another {option}, or --overwrite")
    _check_writable(out, option)


def check_file(
    out: Path, *, overwrite: bool = False, inputs: Iterable[Path | str] = (), option: str = "--out"
) -> None:  # fmt: skip
    """`check_output` of a file: a folder in its place is refused, an empty one too, and whether or not `overwrite`."""
    if out.is_dir():
        raise OutputError(f"{out}: is a folder; give the name of a file to {option}")
    check_output(out, overwrite=overwrite, inputs=inputs, option=option)


def _check_writable(out: Path, option: str) -> None:
    """Raises OutputError where nothing can be made in the folder that is to hold `out`, or the nearest that exists."""
    place = next(parent for parent in Path(os.path.abspath(out)).parents if os.path.lexists(parent))
    if not place.is_dir():
        raise OutputError(f"{out}: cannot be written: {place} is a file and not a folder; give another {option}")
    why = "" if os.access(place, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
    if hasattr(os, "O_TMPFILE"):
        try:  # a file without a name, which nobody sees and no kill leaves behind
            os.close(os.open(place, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                why = error.strerror or ""
    if why:
        raise OutputError(f"{out}: cannot be written: {why}; give another {option}")


def inode(out: Path) -> int | None:
    """Which folder lies at `out`: another number after a commit. None where there is none."""
    try:
        return out.stat().st_ino
    except OSError:
        return None


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _allocated(folder: Path) -> int:
    return sum(entry.stat().st_blocks * 512 for entry in folder.rglob("*") if entry.is_file())


def check_space(out: Path, needs_bytes: int) -> None:
    """Raises OutputError where the disk on which `out` is to lie has less."""
    free = shutil.disk_usage(next(folder for folder in out.parents if folder.exists())).free
    if needs_bytes > free:
        need, has = (f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.1f} MB" for n in (needs_bytes, free))
        raise OutputError(f"{out}: {need} are needed and {has} are free; make room, or give another --out")


def _seal(staging: Staging) -> None:
    """Proves and fsyncs every file, writes the manifest and the seal, and fsyncs every folder."""
    (staging.path / MANIFEST).unlink(missing_ok=True)
    files = {}
    for path in sorted(staging.path.rglob("*")):
        name = path.relative_to(staging.path).as_posix()
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            continue
        if not stat.S_ISREG(mode):
            raise OutputError(f"{path}: is no ordinary file; somebody else writes there. Remove it and run again")
        sync(path)
        size = path.stat().st_size
        if size != staging.sizes.get(name, size):
            raise OutputError(f"{path}: has {size:,} bytes and should have {staging.sizes[name]:,}; run it again")
        files[name] = {"size": size, "sha256": staging.digests.get(name) or sha256_of(path)}
    manifest = json.dumps({"files": files}, indent=1, ensure_ascii=False).encode() + b"\n"
    (staging.path / MANIFEST).write_bytes(manifest)
    staging.manifest_sha256 = hashlib.sha256(manifest).hexdigest()
    sync(staging.path / MANIFEST)
    for folder in [staging.path, *(p for p in staging.path.rglob("*") if p.is_dir())]:
        sync(folder)
    seal(staging)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Names of the files of a committed folder that are missing, cut or changed. Reads everything.

    share: (i, n) reads the i-th of n shares of about the same size, of which every file is in one.
    """
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    wrong, loads = [], [0] * share[1]
    for name, entry in sorted(files.items(), key=lambda file: (-int(file[1]["size"]), file[0])):
        least = loads.index(min(loads))
        loads[least] += int(entry["size"])
        if least != share[0]:
            continue
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"] or sha256_of(path) != entry["sha256"]:
            wrong.append(name)
    return sorted(wrong)


def _move(staging: Staging, out: Path, overwrite: bool) -> None:
    """Puts the sealed folder at `out`, then drops what else lies in the staging folder."""
    if overwrite and os.path.lexists(out):
        if out.is_dir() and not out.is_symlink():
            staging.path.chmod(stat.S_IMODE(out.stat().st_mode))
        _exchange(staging.path, out, staging.root / REPLACED)
    else:
        try:
            staging.path.rename(out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise OutputError(f"{out}: was made by somebody else in the meantime; give another --out") from None
            raise
    # from here on the output is complete: what fails now is a note
    try:
        sync(out.parent)
        with suppress(FileNotFoundError):  # another process of the same job sweeps it, too
            drop(staging.root)
    except OSError as error:
        note_once(f"{out} is complete, but {staging.root} could not be removed ({error.strerror})")


def _exchange(new: Path, out: Path, aside: Path) -> None:
    """Swaps two paths in one step (Linux renameat2), so that a kill never leaves the output path empty.

    Where the file system cannot do that, the old folder is renamed to `aside` first; a kill between the two renames
    leaves both beside each other, and the next run of the command puts the new one in place.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    code = errno.ENOSYS
    if hasattr(libc, "renameat2"):
        if libc.renameat2(here, os.fsencode(new), here, os.fsencode(out), swap) == 0:
            return
        code = ctypes.get_errno()
    if code not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code), str(out))
    note_once("this file system cannot swap folders in one step; the old output is moved away first")
    out.rename(aside)
    new.rename(out)
