"""A corpus tokenized by many processes, on one machine or several that see the same disk: share(job, ...).

All of them run the same command and share the parts of the corpus (checkpoint/sharing.py): a process writes the arrays
of a part aside, and renames them into place. Whoever did which part, the bytes are the same. What a part holds is in
corpus_parts.py, how it is written in part_writer.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from lapis.checkpoint.commit import check_output
from lapis.checkpoint.files import read_json, stamp
from lapis.checkpoint.sharing import (
    PAUSE,
    SharedJob,
    clear,
    errors_for_all,
    finish,
    joined,
    own_name,
    process_count,
    put,
    raise_theirs,
    taken,
)
from lapis.checkpoint.staging import BUILD, JOURNAL, JobName, Staging, disk_errors
from lapis.config import environment_number
from lapis.errors import DataError, LapisError
from lapis.processes import process_environment, python
from lapis.text.rows.corpus_parts import Stretch, read
from lapis.text.rows.part_writer import Report, Shape, Shard, assemble, format_line, write_shard
from lapis.text.rows.rows import MANIFEST, Rows, array_name
from lapis.text.tokenizer.tokenizer import Tokenizer

KIND = "packing"  # what staging folders say of this job
_GOLDEN = 0.6180339887  # multiples of it, less whole numbers, lie far apart


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
    shared = SharedJob(
        out, KIND, job.named, job.key, job.to_json(), partial(_begin, tokenizer), lambda: _finished(out, job)
    )
    if process_count() > 1 and _finished(out, job):  # the other ranks did not wait for this one
        return Rows.open(out)
    check_output(out, overwrite=overwrite)
    try:
        with disk_errors(out), joined(shared) as there:
            if there:
                _work_together(shared.staging, job, tokenizer, min(workers, len(job.parts)), report)
        finish(shared, partial(_seal, job, tokenizer), overwrite=overwrite)
    except LapisError:
        clear(shared)
        raise
    return Rows.open(out)


def _finished(out: Path, job: Job) -> bool:
    try:
        return bool(json.loads((out / MANIFEST).read_bytes()).get("job") == job.key)
    except (OSError, ValueError, AttributeError):
        return False


def _begin(tokenizer: Tokenizer, staging: Path) -> None:
    (staging / BUILD / "tokenizer").mkdir()
    tokenizer.save(staging / BUILD / "tokenizer")


def _work_together(staging: Path, job: Job, tokenizer: Tokenizer, workers: int, report: Report | None) -> None:
    """All parts done, by so many processes beside whoever else is at it."""
    journal = staging / JOURNAL
    if workers > 1:
        command = python("-c", f"from {__name__} import serve; serve()", str(staging), str(os.getpid()))
        variables = {**process_environment(), "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        helpers = [subprocess.Popen([*command, str(number)], env=variables) for number in range(workers)]
        try:
            while any(helper.poll() is None for helper in helpers):
                time.sleep(PAUSE)
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
            raise_theirs(journal)
            if (journal / f"{part}.json").exists() or _take(staging, job, tokenizer, part, go_on, report):
                left.remove(part)
        if len(left) == before:
            time.sleep(PAUSE)


def _take(
    staging: Path, job: Job, tokenizer: Tokenizer, part: int, go_on: Callable[[], bool], report: Report | None
) -> bool:
    """Do one part, unless another process is at it (False)."""
    journal = staging / JOURNAL
    with taken(journal, part) as mine:
        if not mine:
            return False
        if (journal / f"{part}.json").exists():
            return True
        aside = journal / f"{part}.{own_name()}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        with errors_for_all(journal), disk_errors(staging):
            items = read(job.parts[part], job.shape.kind, job.field)
            shard = write_shard(items, tokenizer, job.shape, aside, part=job.parts[part], report=report)
            if not go_on():
                return False
            for name in shard.types:
                (aside / f"{name}.bin").replace(staging / BUILD / array_name(name, part))
            put(journal / f"{part}.json", shard.to_json())
        shutil.rmtree(aside, ignore_errors=True)
        return True


def _so_far(journal: Path) -> tuple[int, int]:
    """Texts and tokens of the parts that are done."""
    shards = [Shard.from_json(read_json(path)) for path in journal.glob("*.json") if path.stem.isdigit()]
    texts = sum(shard.counts.get("documents", 0) + shard.counts.get("chats", 0) for shard in shards)
    return texts, sum(shard.counts["tokens"] for shard in shards)


def _seal(job: Job, tokenizer: Tokenizer, staging: Staging) -> None:
    """rows.json over all parts; arrays of parts without a token are dropped, and the others numbered anew."""
    journal, build = staging.root / JOURNAL, staging.path
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
            staging.digests[array_name(name, number)] = digest
    (build / MANIFEST).write_text(json.dumps({**info, "job": job.key}, indent=1) + "\n")
