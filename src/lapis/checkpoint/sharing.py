"""Several processes, on one machine or several that see the same disk, make one output together, without a center.

They meet in the staging folder (staging.py). The work lies there in parts that are numbered; a process takes one by
locking its file, and says that it is done in a file of JSON. A lock dies with its process, so the parts of one that is
killed are taken by others, and a rerun goes on with what is done. When all is done one process commits the folder; the
others see it. Leaves out: what a part is (text/rows/parallel_packing.py, weights/engine/ranks.py,
weights/delta/ranks.py, weights/diff/ranks.py).
"""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lapis.errors
from lapis.checkpoint.commit import commit
from lapis.checkpoint.files import read_json
from lapis.checkpoint.staging import BUILD, JOURNAL, Busy, JobName, Staging, busy, claim, job_of, staging_of, try_lock
from lapis.config import environment_number
from lapis.errors import LapisError, OutputError

PAUSE = 0.05  # seconds between looks at what the others do

log = logging.getLogger("lapis")


def process_count() -> int:
    """How many processes were started for one job, as torchrun says."""
    return environment_number("WORLD_SIZE", 1)


@dataclass(frozen=True)
class SharedJob:
    """What several processes do together.

    Attributes:
        out: The output, absolute.
        kind: Of job, as staging folders have it.
        named: The job as a user knows it.
        key: Of all that decides the output; another key is other work.
        content: What else the plan says, as JSON.
        begin: Called with a staging folder in which nothing is done yet.
        finished: Whether the output is in place.
        again: Called with a staging folder that an earlier run left, by the first that comes.
    """

    out: Path
    kind: str
    named: JobName
    key: str
    content: Any
    begin: Callable[[Path], None]
    finished: Callable[[], bool]
    again: Callable[[Path], None] = lambda staging: None

    @property
    def staging(self) -> Path:
        return staging_of(self.out)

    @property
    def journal(self) -> Path:
        return self.staging / JOURNAL

    @property
    def is_there(self) -> bool:
        """Whether the staging folder holds this job's parts."""
        plan = self.journal / "plan.json"
        return plan.is_file() and bool(read_json(plan)["key"] == self.key)


@contextmanager
def joined(job: SharedJob) -> Iterator[bool]:
    """The staging folder with this job in it, held so that nobody clears or commits it; False where all is done.

    Who finds it free puts the job there (what lies there of this job on other content is deleted); the others come in.
    """
    staging = job.staging
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if try_lock(handle, fcntl.LOCK_EX) and _same(handle, staging):
                if process_count() > 1 and job.finished():  # all was done between two looks
                    shutil.rmtree(staging)
                    yield False
                    return
                claim(staging, job.kind, job.named)
                if job.is_there:
                    job.again(staging)
                else:
                    _begin(job)
                (job.journal / "error.json").unlink(missing_ok=True)
                try_lock(handle, fcntl.LOCK_SH)  # nobody else can have it: this process lets go of its own
            elif not try_lock(handle, fcntl.LOCK_SH):  # another process starts it, or commits it
                time.sleep(PAUSE)
                if job.finished():
                    yield False
                    return
                continue
            if not _same(handle, staging) or not (job.journal / "plan.json").is_file():
                continue
            if not job.is_there:
                raise busy(staging)
            yield True
            return
        finally:
            os.close(handle)


def _same(handle: int, place: Path) -> bool:
    """False where the folder was renamed away in between."""
    try:
        return os.stat(place).st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _begin(job: SharedJob) -> None:
    if (job.journal / "plan.json").is_file():
        log.warning("%s: what was begun there was of files that changed; done anew", job.staging)
    for entry in (job.journal, job.staging / BUILD):
        shutil.rmtree(entry, ignore_errors=True)
        entry.mkdir()
    job.begin(job.staging)
    put(job.journal / "plan.json", {"key": job.key, "job": job.content})


def put(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    aside = path.with_name(f"{path.name}.{own_name()}")
    aside.write_text(json.dumps(value))
    aside.replace(path)


def own_name() -> str:
    """What no other process that works here is called."""
    return f"{os.uname().nodename}-{os.getpid()}"


@contextmanager
def taken(journal: Path, part: str | int) -> Iterator[bool]:
    """Takes a part for as long as the block runs, unless another process is at it (False)."""
    handle = os.open(journal / f"{part}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        yield try_lock(handle, fcntl.LOCK_EX)
    finally:
        os.close(handle)


@contextmanager
def errors_for_all(journal: Path) -> Iterator[None]:
    """An error of lapis in the block is left for the other processes, which raise it, too (`raise_theirs`)."""
    try:
        yield
    except LapisError as error:
        with suppress(FileNotFoundError):
            put(journal / "error.json", {"type": type(error).__name__, "message": str(error)})
        raise


def raise_theirs(journal: Path) -> None:
    """Raises what another process raised."""
    path = journal / "error.json"
    if path.exists():
        failure = read_json(path)
        kind = getattr(lapis.errors, str(failure.get("type")), None)
        if not (isinstance(kind, type) and issubclass(kind, LapisError)):
            kind = LapisError
        error = LapisError.__new__(kind)
        error.args = (str(failure.get("message")),)
        raise error


def share_parts(journal: Path, count: int, do: Callable[[int], Any], report: Callable[[list[int]], None]) -> None:
    """Does parts until all are done, by this process and whoever else is at it.

    Args:
        journal: Of the job that this process has joined.
        count: Of parts; N.json in the journal says that part N is done.
        do: Called with the number of a part that nobody else is at; gives what its file is to hold.
        report: Called with the numbers of the parts that are done, as there are more.
    """
    left = list(range(count))
    while left:
        before = list(left)
        for number in before:
            raise_theirs(journal)
            place = journal / f"{number}.json"
            with taken(journal, number) as mine:
                if mine and not place.exists():
                    with errors_for_all(journal):
                        put(place, do(number))
            if place.exists():
                left.remove(number)
                report([each for each in range(count) if (journal / f"{each}.json").exists()])
        if left == before:
            time.sleep(PAUSE)


class _NothingHere(Exception):
    """The staging folder was committed by another process between two looks."""


def finish(
    job: SharedJob,
    seal: Callable[[Staging], None],
    *,
    overwrite: bool = False,
    inputs: Iterable[Path | str] = (),
) -> None:
    """Commits the output, unless another process does: then waits until it is there.

    Args:
        job: All of whose parts are done.
        seal: Called by the one that commits, with the staging folder; writes what is left to be written.
        overwrite: Swap an existing folder for the new one.
        inputs: Folders that are read.
    """
    while not job.finished() or job.staging.exists():
        try:
            with commit(
                job.out, kind=job.kind, job=job.named, overwrite=overwrite, inputs=inputs, resumable=True
            ) as sealed:
                if not job.is_there:
                    raise _NothingHere
                seal(sealed)
            return
        except _NothingHere:
            with suppress(OSError):  # somebody else began something there
                job.staging.rmdir()
            if os.path.lexists(job.out):
                return
            raise OutputError(f"{job.out}: another process refused what was made, and says why") from None
        except Busy:
            time.sleep(PAUSE)
        except OutputError:
            if not job.finished():
                raise
            return


def clear(job: SharedJob) -> None:
    """After a refusal, nothing is left; but another process may still be at it, or it may be another job's."""
    try:
        handle = os.open(job.staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not try_lock(handle, fcntl.LOCK_EX):
            return
        if job_of(job.staging) == job.named:
            shutil.rmtree(job.staging, ignore_errors=True)
    finally:
        os.close(handle)
