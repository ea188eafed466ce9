"""The staging folder: the hidden sibling in which an output is made, who owns it, and what it looks like after a kill.

    .NAME.lapis/owner.json     which kind of job works here, and which job of that kind
    .NAME.lapis/.journal...    what a job needs to go on after a kill
    .NAME.lapis/out/           the output as it grows
    .NAME.lapis/sealed.json    out/ is whole and on the disk; which folder it is

A folder that another user, another job or another program left is refused and never touched. How an output is
sealed and put into place: commit.py. What jobs hold in their journals: weights/engine/journal.py,
training/loop/state.py, text/rows/parallel_packing.py.
"""

import errno
import fcntl
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from lapis.errors import OutputError

JOURNAL = ".journal"  # what a job keeps for its rerun lies in the staging folder under names that start so
BUILD = "out"  # the folder in the staging folder that becomes the output
REPLACED = "replaced"  # the old output, where it could not be swapped in one step
_OWNER, _SEAL = "owner.json", "sealed.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # of folders; a file that is not synced is an error
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

log = logging.getLogger("lapis")  # a warning is a line on standard error, unless a program decides otherwise


@dataclass(frozen=True)
class JobName:
    """Which of its kind a job is that can be gone on with.

    Attributes:
        key: Differs from that of any job that a user would call another one.
        about: What people know it by, such as its inputs.
    """

    key: str
    about: str


class Busy(OutputError):
    """Another process is writing there."""


@dataclass
class Staging:
    """A folder being built.

    Attributes:
        path: Where to write.
        root: The staging folder; a job's journal lies here, under names that start with JOURNAL.
        digests: sha256 that the writer knows already, by relative name.
        sizes: Bytes that files must have on the disk, where the writer knows them.
        manifest_sha256: Of the manifest, once it is written.
        useless: What lies here is no good, and none of it is kept for a rerun.
    """

    path: Path
    root: Path
    digests: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    manifest_sha256: str = ""
    useless: bool = False

    @property
    def fresh(self) -> bool:
        """True where nothing of an earlier run lies here."""
        return not any(self.path.iterdir()) and not any(e.name.startswith(JOURNAL) for e in self.root.iterdir())


def staging_of(out: Path) -> Path:
    """The hidden sibling in which `out` is made."""
    return out.with_name(f".{out.name}.lapis")


def claim(root: Path, kind: str, job: JobName | None = None) -> None:
    """Makes a staging folder this job's own, with an empty or a half-made `out/` in it. Its lock is held.

    Args:
        root: The staging folder.
        kind: Of job.
        job: Which one, where it goes on with what an interrupted one has done.

    Raises:
        OutputError: Where another user, another job or somebody without lapis put something there.
    """
    place = root.lstat()
    if place.st_uid != os.geteuid():
        raise OutputError(f"{root}: belongs to another user; remove it, or give another --out")
    owner = kind_of(root)
    if owner is None:
        names = sorted(entry.name for entry in root.iterdir())
        raise OutputError(f"{root}: holds what lapis did not write ({_few(names)}); move it, or give another --out")
    if owner not in ("", kind):
        raise OutputError(
            f"{root}: holds a {owner} that was interrupted; finish it with its own command, remove that folder to give "
            "it up, or give another --out"
        )
    before = job_of(root)
    if before is not None and before != job and (job is None or before.key != job.key):
        what = (
            f"another {kind} ({before.about})"
            if job is None or before.about != job.about
            else f"a {kind} of the same inputs with other settings"
        )
        raise OutputError(
            f"{root}: holds {what} that was interrupted; finish it with its own command, remove that folder to give it "
            "up, or give another --out"
        )
    with disk_errors(root):
        _adopt_flat(root)
        (root / _SEAL).unlink(missing_ok=True)  # a rerun works on: what it makes is not what was sealed
        if not owner or (job is not None and before is None):
            _write_json(root / _OWNER, {"kind": kind, **({"job": asdict(job)} if job else {})})
        (root / BUILD).mkdir(exist_ok=True)


def kind_of(root: Path) -> str | None:
    """The kind of job that a staging folder belongs to; "" where it is empty, None where lapis did not make it."""
    names = {entry.name for entry in root.iterdir()}
    if _OWNER in names:
        try:
            return str(json.loads((root / _OWNER).read_bytes())["kind"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""  # cut by a kill, before anything else was written
    if not names or _cleaned_up(names):
        return ""
    # jobs that were interrupted before staging folders named their owner
    if f"{JOURNAL}.jsonl" in names:
        return "merge"
    if (root / JOURNAL / "plan.json").is_file():
        return "packing"
    return "training" if (root / JOURNAL).is_dir() else None


def job_of(root: Path) -> JobName | None:
    """The job that a staging folder belongs to, where its kind is one that goes on."""
    try:
        return JobName(**json.loads((root / _OWNER).read_bytes())["job"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cleaned_up(names: set[str]) -> bool:
    """Whether that is what a finished job has left that was killed while it removed its staging folder."""
    ours = (name in (_SEAL, BUILD, REPLACED) or name.startswith(JOURNAL) for name in names)
    return _SEAL in names and all(ours)


def _adopt_flat(root: Path) -> None:
    """What was built beside the journal, as staging folders once had it, goes to `out/`; what is done with, goes."""
    names = {entry.name for entry in root.iterdir()}
    if _cleaned_up(names):
        _empty(root)
    elif _OWNER not in names and any(name.startswith(JOURNAL) for name in names):
        (root / BUILD).mkdir(exist_ok=True)
        for name in names - {BUILD}:
            if not name.startswith(JOURNAL):
                (root / name).rename(root / BUILD / name)


def sweep_finished(out: Path) -> None:
    """Ends what a job that was killed after its seal had still to do, where that needs no work of the job's own.

    The output is in place: the staging folder is removed. The old output was moved aside and the new one is not yet in
    its place (file systems that cannot swap): it is put there.
    """
    root = staging_of(out)
    if os.path.lexists(out):
        with suppress(OSError):
            root.rmdir()  # killed when all but the empty folder was gone
    try:
        sealed = json.loads((root / _SEAL).read_bytes())["inode"]
        if root.lstat().st_uid != os.geteuid():
            return
        handle = lock(root)
    except (OSError, ValueError, KeyError, TypeError, OutputError):
        return
    try:
        with suppress(OSError):
            build = root / BUILD
            if not os.path.lexists(out) and (root / REPLACED).exists() and build.lstat().st_ino == sealed:
                build.rename(out)
            if out.lstat().st_ino == sealed:
                drop(root)
    finally:
        os.close(handle)


def is_made(out: Path) -> bool:
    """Whether an output folder is in place; what a job that was killed right after that left beside it is removed."""
    sweep_finished(Path(os.path.abspath(out)))
    return out.is_dir()


def give_up(out: Path) -> None:
    """Removes what an interrupted job has left of an output, so that another job can begin there. What another user, or
    no lapis, put there stays.

    Raises:
        OutputError: Where another process is writing it.
    """
    root = staging_of(Path(os.path.abspath(out)))
    if not root.is_dir() or root.is_symlink() or root.lstat().st_uid != os.geteuid() or kind_of(root) is None:
        return
    handle = lock(root)
    try:
        with disk_errors(root):
            drop(root)
    finally:
        os.close(handle)


def drop(root: Path) -> None:
    """Removes a staging folder."""
    _empty(root)
    root.rmdir()


def _empty(root: Path) -> None:
    """Removes what is in a staging folder, its seal last: as long as anything lies here the seal says what."""
    for entry in root.iterdir():
        if entry.name != _SEAL:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    (root / _SEAL).unlink(missing_ok=True)


def seal(staging: Staging) -> None:
    """Notes that the build is whole and on the disk."""
    _write_json(staging.root / _SEAL, {"inode": staging.path.stat().st_ino, "manifest": staging.manifest_sha256})


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _write_json(path: Path, value: object) -> None:
    """A small file, on the disk when this returns."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(handle, "wb") as file:
        file.write(json.dumps(value).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync(path.parent)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns a full disk or a read-only place into one line. An error that names another place goes on as it is."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str) and not _lies_in(error.filename, out.parent):
            raise
        if error.errno in _FULL:
            raise OutputError(
                f"{out}: the disk is full ({error.strerror}); nothing was left half-written: make room, then run the "
                "same command again"
            ) from error
        if error.errno in _CLOSED:
            raise OutputError(f"{out}: cannot be written: {error.strerror}; give another --out") from error
        raise


def busy(staging: Path) -> Busy:
    """The refusal where another process works on the output of a staging folder."""
    out = staging.with_name(staging.name.removeprefix(".").removesuffix(".lapis"))
    return Busy(f"{out}: another lapis is writing it; wait for it, or give another --out")


def lock(staging: Path) -> int:
    """Makes the staging folder and locks it against a second writer; the lock dies with the process."""
    with disk_errors(staging):
        while True:
            staging.mkdir(parents=True, exist_ok=True)
            try:
                handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # swept by somebody else between the two calls
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise OutputError(f"{staging}: is a link or a file; remove it, or give another --out") from None
                raise
            try:
                if not try_lock(handle):
                    raise busy(staging)
                if os.stat(staging).st_ino == os.fstat(handle).st_ino:  # not renamed away in between
                    if not os.access(staging, os.W_OK):
                        raise OutputError(f"{staging}: cannot be written; give another --out")
                    return handle
            except FileNotFoundError:
                pass  # swept by somebody else between the two looks
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)


def _lies_in(path: str, folder: Path) -> bool:
    return Path(os.path.abspath(path)).is_relative_to(os.path.abspath(folder))


def try_lock(handle: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Locks an open file; False where another process has the lock. A file system without locks is noted, not refused.

    kind: LOCK_EX or LOCK_SH of fcntl.
    """
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        note_once("this file system has no locks; do not write one output with two commands at once")
    return True


@cache
def note_once(text: str) -> None:
    """A line on standard error, the first time that it is said."""
    log.warning("note: %s", text)


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP) or not stat.S_ISDIR(
            os.fstat(handle).st_mode
        ):
            raise  # a file; of folders some file systems know no fsync
    finally:
        os.close(handle)
