"""A corpus tokenized by many processes, on one machine or several that see the same disk: share(job, ...).

All of them run the same command. The parts lie open in the staging folder; a process takes one by locking its file,
writes its arrays aside, and renames them into place. A lock dies with its process, so the parts of one that is killed
are taken by others, and a rerun goes on with what is done. When all parts are done one process commits the folder; the
others see it. Whoever did which part, the bytes are the same. What a part holds is in corpus_parts.py, how it is
written in part_writer.py.
"""

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import lapis.errors
from lapis.checkpoint.commit import check_output, commit
from lapis.checkpoint.files import read_json, stamp
from lapis.checkpoint.staging import BUILD, JOURNAL, Busy, JobName, claim, disk_errors, job_of, staging_of, try_lock
from lapis.config import environment_number
from lapis.errors import DataError, LapisError, OutputError
from lapis.processes import process_environment, python
from lapis.text.rows.corpus_parts import Stretch, read
from lapis.text.rows.part_writer import Report, Shape, Shard, assemble, format_line, write_shard
from lapis.text.rows.rows import MANIFEST, Rows, array_name
from lapis.text.tokenizer.tokenizer import Tokenizer

KIND = "packing"  # what staging folders say of this job
_PAUSE = 0.05  # seconds between looks at what the others do
_GOLDEN = 0.6180339887  # multiples of it, less whole numbers, lie far apart

log = logging.getLogger("lapis")


@dataclass(frozen=True)
class Job:
    """What is packed. tokenizer: its digest."""

    shape: Shape
    field: str | None
    parts: list[list[Stretch]]
    tokenizer: str

    @cached_property
    def key(self) -> str:
        """The same job on the same files has the same key."""
        places = {stretch.file for part in self.parts for stretch in part}
        stamps = {str(place): stamp(place.stat()) for place in places}
        return sha256(json.dumps([self.to_json(), stamps], sort_keys=True).encode()).hexdigest()

    @property
    def named(self) -> JobName:
        """The job as a user knows it: the same command has the same, though the files hold something else."""
        places = sorted({str(stretch.file) for part in self.parts for stretch in part})
        text = json.dumps([asdict(self.shape), self.field, self.tokenizer, places], sort_keys=True)
        more = f" and {len(places) - 1:,} more" if len(places) > 1 else ""
        return JobName(sha256(text.encode()).hexdigest(), f"{places[0]}{more}")

    def to_json(self) -> dict[str, Any]:
        value = asdict(self)
        if self.shape.special == "plain":  # as in jobs of versions that knew nothing else, which go on
            del value["shape"]["special"]
        return json.loads(json.dumps(value, default=str))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Job":
        parts = [[Stretch(Path(s["file"]), s["first"], s["last"]) for s in part] for part in value["parts"]]
        return cls(Shape(**value["shape"]), value["field"], parts, value["tokenizer"])


def share(
    job: Job, tokenizer: Tokenizer, out: Path, *, workers: int, overwrite: bool = False, report: Report | None = None
) -> Rows:
    """Do the job, or help those that are at it, and open what came of it. Raises what the worker that failed did."""
    out = Path(os.path.abspath(out))
    if _ranks() > 1 and _finished(out, job):  # the other ranks did not wait for this one
        return Rows.open(out)
    check_output(out, overwrite=overwrite)
    staging = staging_of(out)
    try:
        with disk_errors(out), _joined(staging, out, job, tokenizer) as there:
            if there:
                _work_together(staging, job, tokenizer, min(workers, len(job.parts)), report)
        while not _finished(out, job) or staging.exists():
            try:
                with commit(out, kind=KIND, job=job.named, overwrite=overwrite, resumable=True) as sealed:
                    _seal(staging, sealed.digests, job, tokenizer)
                break
            except _NothingHere:
                with suppress(OSError):  # somebody else began something there
                    staging.rmdir()
            except Busy:
                time.sleep(_PAUSE)
            except OutputError:
                if not _finished(out, job):
                    raise
                break
    except LapisError:
        _clear(staging, job)
        raise
    return Rows.open(out)


def _ranks() -> int:
    return environment_number("WORLD_SIZE", 1)


class _NothingHere(Exception):
    """The staging folder was committed by another process between two looks."""


def _finished(out: Path, job: Job) -> bool:
    try:
        return bool(json.loads((out / MANIFEST).read_bytes()).get("job") == job.key)
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def _joined(staging: Path, out: Path, job: Job, tokenizer: Tokenizer) -> Iterator[bool]:
    """The staging folder with this job in it, held so that nobody clears or commits it; False where all is done.

    Who finds it free puts the job there (what lies there of this job on other content is deleted); the others come in.
    """
    plan = staging / JOURNAL / "plan.json"
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if try_lock(handle, fcntl.LOCK_EX) and _same(handle, staging):
                if _ranks() > 1 and _finished(out, job):  # all was done between two looks
                    shutil.rmtree(staging)
                    yield False
                    return
                claim(staging, KIND, job.named)
                if not _holds(staging, job):
                    _begin(staging, job, tokenizer)
                (staging / JOURNAL / "error.json").unlink(missing_ok=True)
                try_lock(handle, fcntl.LOCK_SH)  # nobody else can have it: this process lets go of its own
            elif not try_lock(handle, fcntl.LOCK_SH):  # another process starts it, or commits it
                time.sleep(_PAUSE)
                if _finished(out, job):
                    yield False
                    return
                continue
            if not _same(handle, staging) or not plan.is_file():
                continue
            if not _holds(staging, job):
                raise Busy(f"{out.parent}: another lapis is writing {staging.name}; wait for it")
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


def _holds(staging: Path, job: Job) -> bool:
    plan = staging / JOURNAL / "plan.json"
    return plan.is_file() and bool(read_json(plan)["key"] == job.key)


def _begin(staging: Path, job: Job, tokenizer: Tokenizer) -> None:
    if (staging / JOURNAL / "plan.json").is_file():
        log.warning("%s: what was begun there was of files that changed; done anew", staging)
    for entry in (staging / JOURNAL, staging / BUILD):
        shutil.rmtree(entry, ignore_errors=True)
        entry.mkdir()
    (staging / BUILD / "tokenizer").mkdir()
    tokenizer.save(staging / BUILD / "tokenizer")
    _put(staging / JOURNAL / "plan.json", {"key": job.key, "job": job.to_json()})


def _put(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    aside = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}")
    aside.write_text(json.dumps(value))
    aside.replace(path)


def _clear(staging: Path, job: Job) -> None:
    """After a refusal, nothing is left; but another process may still be at it, or it may be another job's."""
    try:
        handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not try_lock(handle, fcntl.LOCK_EX):
            return
        if job_of(staging) == job.named:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(handle)


def _work_together(staging: Path, job: Job, tokenizer: Tokenizer, workers: int, report: Report | None) -> None:
    """All parts done, by so many processes beside whoever else is at it."""
    journal = staging / JOURNAL
    if workers > 1:
        command = python("-c", f"from {__name__} import serve; serve()", str(staging), str(os.getpid()))
        variables = {**process_environment(), "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        helpers = [subprocess.Popen([*command, str(number)], env=variables) for number in range(workers)]
        try:
            while any(helper.poll() is None for helper in helpers):
                time.sleep(_PAUSE)
                if report is not None:
                    report(*_so_far(journal))
        finally:
            for helper in helpers:
                helper.terminate()
                helper.wait()
    done = _so_far(journal)
    work(staging, job, tokenizer, report=report and (lambda texts, tokens: report(done[0] + texts, done[1] + tokens)))


def serve() -> None:
    """What a helping process runs: python -c "..." STAGING PARENT NUMBER."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its helpers
    staging, parent, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    job = Job.from_json(read_json(staging / JOURNAL / "plan.json")["job"])
    try:
        work(staging, job, Tokenizer.open(staging / BUILD / "tokenizer"), number, lambda: os.getppid() == parent)
    except (LapisError, FileNotFoundError):
        sys.exit(1)  # it is in error.json, or the folder is gone with the command that made it


def work(
    staging: Path,
    job: Job,
    tokenizer: Tokenizer,
    number: int = 0,
    go_on: Callable[[], bool] = lambda: True,
    report: Report | None = None,
) -> None:
    """Does one open part after another until all are done.

    Args:
        staging: The folder that all processes share.
        job: What is packed.
        tokenizer: The one of the job.
        number: Where to begin, so that workers seldom meet.
        go_on: Asked before each part; False ends the work.
        report: Called with the texts done and the tokens written.
    """
    journal = staging / JOURNAL
    left = list(range(len(job.parts)))
    seat = environment_number("RANK", 0) * 64 + number
    first = int(len(left) * (seat * _GOLDEN % 1))
    left = left[first:] + left[:first]
    while left:
        before = len(left)
        for part in list(left):
            if not go_on():
                return
            _raise_worker_error(journal)
            if (journal / f"{part}.json").exists() or _take(staging, job, tokenizer, part, go_on, report):
                left.remove(part)
        if len(left) == before:
            time.sleep(_PAUSE)


def _take(
    staging: Path, job: Job, tokenizer: Tokenizer, part: int, go_on: Callable[[], bool], report: Report | None
) -> bool:
    """Do one part, unless another process is at it (False). The lock is the operating system's."""
    journal = staging / JOURNAL
    handle = os.open(journal / f"{part}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not try_lock(handle, fcntl.LOCK_EX):
            return False
        if (journal / f"{part}.json").exists():
            return True
        aside = journal / f"{part}.{os.uname().nodename}-{os.getpid()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            with disk_errors(staging):
                items = read(job.parts[part], job.shape.kind, job.field)
                shard = write_shard(items, tokenizer, job.shape, aside, part=job.parts[part], report=report)
                if not go_on():
                    return False
                for name in shard.types:
                    (aside / f"{name}.bin").replace(staging / BUILD / array_name(name, part))
                _put(journal / f"{part}.json", shard.to_json())
        except LapisError as error:
            _put(journal / "error.json", {"type": type(error).__name__, "message": str(error)})
            raise
        shutil.rmtree(aside, ignore_errors=True)
        return True
    finally:
        os.close(handle)


def _raise_worker_error(journal: Path) -> None:
    """Raises what another worker raised."""
    path = journal / "error.json"
    if path.exists():
        failure = read_json(path)
        kind = getattr(lapis.errors, str(failure.get("type")), None)
        if not (isinstance(kind, type) and issubclass(kind, LapisError)):
            kind = LapisError
        error = LapisError.__new__(kind)
        error.args = (str(failure.get("message")),)
        raise error


def _so_far(journal: Path) -> tuple[int, int]:
    """Texts and tokens of the parts that are done."""
    shards = [Shard.from_json(read_json(path)) for path in journal.glob("*.json") if path.stem.isdigit()]
    texts = sum(shard.counts.get("documents", 0) + shard.counts.get("chats", 0) for shard in shards)
    return texts, sum(shard.counts["tokens"] for shard in shards)


def _seal(staging: Path, digests: dict[str, str], job: Job, tokenizer: Tokenizer) -> None:
    """rows.json over all parts; arrays of parts without a token are dropped, and the others numbered anew."""
    journal, build = staging / JOURNAL, staging / BUILD
    if not _holds(staging, job):
        raise _NothingHere
    if replace(job).key != job.key:
        raise DataError("the files changed while they were packed; pack them again")
    shards = [Shard.from_json(read_json(journal / f"{part}.json")) for part in range(len(job.parts))]
    info, used = assemble(shards, job.shape, tokenizer, format_line(job.shape.kind, job.parts[0][0].file, job.field))
    for part in set(range(len(shards))) - set(used):
        for name in shards[part].types:
            (build / array_name(name, part)).unlink(missing_ok=True)
    for number, part in enumerate(used):
        for name, digest in shards[part].digests.items():
            if number != part and (build / array_name(name, part)).exists():  # a rerun after a kill finds it renamed
                (build / array_name(name, part)).replace(build / array_name(name, number))
            digests[array_name(name, number)] = digest
    (build / MANIFEST).write_text(json.dumps({**info, "job": job.key}, indent=1) + "\n")
