"""The one way anything is written: whole, or not at all.

A folder is built in a hidden sibling, `.NAME.lapis`; then every file is fsynced, a manifest with sizes and sha256 is
written, and the sibling is renamed into place. Until then nothing at the output path is loadable. A kill leaves at
most the hidden sibling, which the next run of the same command clears, or goes on from where the job is resumable.
Leaves out: what a job's journal holds (weights/engine/stream.py, training/loop/state.py).
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lapis.errors import OutputError

MANIFEST = "lapis-manifest.json"
JOURNAL = ".journal"  # entries of a staging folder whose names start so are dropped at the commit
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


class Busy(OutputError):
    """Another process is writing there."""


@dataclass
class Staging:
    """A folder being built. path: where to write. digests: sha256 that the writer knows already, by relative name."""

    path: Path
    digests: dict[str, str] = field(default_factory=dict)
    manifest_sha256: str = ""

    @property
    def fresh(self) -> bool:
        """True where nothing of an earlier run lies here."""
        return not any(self.path.iterdir())


@contextmanager
def commit(
    out: Path | str,
    *,
    overwrite: bool = False,
    needs_bytes: int = 0,
    inputs: Iterable[Path | str] = (),
    resumable: bool = False,
) -> Iterator[Staging]:
    """Build a folder and put it at `out` in one step when the block ends without an error.

    overwrite: swap an existing folder for the new one, whole. needs_bytes: refuse now if the disk has less.
    inputs: folders that are read; `out` must not be one of them. resumable: on failure keep what is there for a rerun.
    Raises OutputError before any work for an output that exists, is an input, is locked, or cannot be written.
    """
    out = Path(os.path.abspath(out))
    check_output(out, overwrite=overwrite, inputs=inputs)
    staging = Staging(staging_of(out))
    lock = _lock(staging.path)
    try:
        if not resumable:
            _empty(staging.path)
        _check_space(out.parent, needs_bytes - _allocated(staging.path))
        with full_disk_told(out):
            yield staging
            _seal(staging)
            _move(staging.path, out, overwrite)
    except BaseException:
        if not resumable:
            shutil.rmtree(staging.path, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def commit_file(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Write one file and put it at `path` in one step. Yields the temporary path to write to."""
    path = Path(os.path.abspath(path))
    check_output(path, overwrite=overwrite)
    with full_disk_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.lapis-{os.getpid()}")
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def staging_of(out: Path) -> Path:
    """The hidden sibling in which `out` is built."""
    return out.with_name(f".{out.name}.lapis")


def check_output(out: Path, *, overwrite: bool = False, inputs: Iterable[Path | str] = ()) -> None:
    """Raises OutputError where `out` must not be written: it is (in) an input, or it exists."""
    real = Path(os.path.realpath(out))
    for source in inputs:
        other = Path(os.path.realpath(source))
        if real.is_relative_to(other) or other.is_relative_to(real):
            raise OutputError(f"{out}: is the input {source}, or lies within it; give another --out")
    if os.path.lexists(out) and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError(f"{out}: exists already; give another --out, or --overwrite")


@contextmanager
def full_disk_told(out: Path) -> Iterator[None]:
    """Turns a full disk or a read-only place into one line."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise OutputError(f"{out}: the disk is full ({error.strerror}); nothing was left half-written") from error
        if error.errno in _CLOSED:
            raise OutputError(f"{out}: cannot be written: {error.strerror}; give another --out") from error
        raise


def _lock(staging: Path) -> int:
    """Makes the staging folder and locks it against a second writer; the lock dies with the process."""
    with full_disk_told(staging):
        while True:
            staging.mkdir(parents=True, exist_ok=True)
            handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.stat(staging).st_ino == os.fstat(handle).st_ino:  # not renamed away in between
                    if not os.access(staging, os.W_OK):
                        raise OutputError(f"{staging}: cannot be written; give another --out")
                    return handle
            except BlockingIOError:
                os.close(handle)
                raise Busy(f"{staging.parent}: another lapis is writing {staging.name}; wait for it") from None
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _allocated(folder: Path) -> int:
    return sum(entry.stat().st_blocks * 512 for entry in folder.rglob("*") if entry.is_file())


def _check_space(place: Path, needs_bytes: int) -> None:
    free = shutil.disk_usage(place).free
    if needs_bytes > free:
        raise OutputError(f"{place}: {needs_bytes / 1e9:,.1f} GB are needed and {free / 1e9:,.1f} GB are free")


def _seal(staging: Staging) -> None:
    """fsync every file, write the manifest, drop the journal, fsync every folder.

    The journal goes last: a kill before that moment finds it, and goes on from it.
    """
    (staging.path / MANIFEST).unlink(missing_ok=True)
    journal = [entry for entry in staging.path.iterdir() if entry.name.startswith(JOURNAL)]
    files = {}
    for path in sorted(p for p in staging.path.rglob("*") if p.is_file()):
        name = path.relative_to(staging.path).as_posix()
        if name.startswith(JOURNAL):
            continue
        _sync(path)
        files[name] = {"size": path.stat().st_size, "sha256": staging.digests.get(name) or sha256_of(path)}
    manifest = json.dumps({"files": files}, indent=1, ensure_ascii=False).encode() + b"\n"
    (staging.path / MANIFEST).write_bytes(manifest)
    staging.manifest_sha256 = hashlib.sha256(manifest).hexdigest()
    _sync(staging.path / MANIFEST)
    for entry in journal:
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for folder in [staging.path, *(p for p in staging.path.rglob("*") if p.is_dir())]:
        _sync(folder)


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> list[str]:
    """Names of the files of a committed folder that are missing, cut or changed. Reads everything."""
    files = json.loads((folder / MANIFEST).read_bytes())["files"]
    wrong = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"] or sha256_of(path) != entry["sha256"]:
            wrong.append(name)
    return wrong


def _move(staging: Path, out: Path, overwrite: bool) -> None:
    if overwrite and os.path.lexists(out):
        _exchange(staging, out)
        _sync(out.parent)
        if staging.is_dir() and not staging.is_symlink():
            shutil.rmtree(staging)
        else:
            staging.unlink()
    else:
        try:
            staging.rename(out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise OutputError(f"{out}: was made by somebody else in the meantime; give another --out") from None
            raise
    _sync(out.parent)


def _exchange(one: Path, two: Path) -> None:
    """Swaps two paths in one step (Linux renameat2), so that a kill never leaves the output path empty."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if libc.renameat2(here, os.fsencode(one), here, os.fsencode(two), swap) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(two))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
