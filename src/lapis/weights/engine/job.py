"""A job of the engine: outputs and inputs in, a committed model folder with its account out.

Staged, journaled, streamed, described, committed: the one way in which a graft, a merge or a fused adapter becomes a
folder. The account holds nothing that differs between two runs of the same job (no times, no memory), so that a job
that was killed and went on gives the same bytes.
"""

import hashlib
import json
import logging
import os
import resource
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lapis import __version__
from lapis.checkpoint import Checkpoint
from lapis.checkpoint.commit import MANIFEST, check_output, commit, sha256_of
from lapis.checkpoint.files import read_json, stamp
from lapis.checkpoint.remote.ranges import DigestMismatch
from lapis.checkpoint.remote.shared_memory import keeping
from lapis.checkpoint.sharing import SharedJob, finish, process_count
from lapis.checkpoint.staging import JOURNAL, JobName, Staging, staging_of
from lapis.checkpoint.towers import language_levels
from lapis.errors import CheckpointError, LapisError
from lapis.weights.account import identity, lost_in_all
from lapis.weights.engine.journal import Identity, Journal
from lapis.weights.engine.outputs import Account, Output
from lapis.weights.engine.ranks import account_of, division, forget_digests, lay_out, write_together
from lapis.weights.engine.stream import stream
from lapis.weights.engine.tiles import TILE
from lapis.weights.tokenizer_files import ACCOUNT

DIVIDED = (1, 8, 64)  # processes for which a dry run says what each would do

log = logging.getLogger("lapis")


@dataclass
class JobResult:
    """What a job returns; `to_json` gives the keys that other programs rely on."""

    out: str
    tensors: dict[str, int]
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_resumed: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    sha256: str = ""
    needs: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False

    def record(self, read: int, written: int, resumed: int, sha256: str) -> None:
        """Fills in what a run has done, in bytes, and the digest of what it has committed."""
        self.bytes_read, self.bytes_written, self.bytes_resumed, self.sha256 = read, written, resumed, sha256
        self.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if value is not None}


@dataclass
class MergeResult(JobResult):
    """What `graft` and `merge` return. division: of a dry run, what the busiest of some processes would do."""

    lost_to_rounding: float | None = None
    nonfinite: int = 0
    vocabulary: dict[str, Any] = field(default_factory=dict)
    smoke: dict[str, Any] | None = None
    division: list[dict[str, int]] | None = None


def produce(
    result: MergeResult,
    files: Mapping[str, Sequence[Output]],
    inputs: Mapping[str, Checkpoint],
    recipe: Any,
    beside: Callable[[Path, Account], None],
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    check: Callable[[Path], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the files of a model and commits them at result.out; fills in what was measured. A dry run only checks the
    place.

    check(folder): Called when all is written and nothing is visible; where it raises LapisError, nothing is kept.

    recipe: all that decides the output besides the inputs, as JSON; a journal of another recipe is not gone on with.
    beside(folder, account): writes what is not a weight. result.needs["disk_bytes"] must be free.
    """
    folders = [checkpoint.root for checkpoint in inputs.values()]
    if result.dry_run:
        result.division = [division(files, processes) for processes in DIVIDED]
        check_output(Path(os.path.abspath(result.out)), overwrite=overwrite, inputs=folders)
        return
    named = job_name(inputs, recipe)  # allowing what stopped it is the same job
    out = Path(os.path.abspath(result.out))
    if process_count() > 1 or (staging_of(out) / JOURNAL / "plan.json").is_file():
        _produce_together(
            result, out, named, files, inputs, recipe, beside, overwrite, allow_nonfinite, check, progress
        )
        return
    with commit(
        result.out,
        kind="merge",
        job=named,
        overwrite=overwrite,
        needs_bytes=result.needs["disk_bytes"],
        inputs=folders,
        resumable=True,
    ) as staging:
        check_unmoved(staging, inputs)
        journal = Journal(staging, _job(inputs, files, [recipe, allow_nonfinite]), input_files(inputs))
        if journal.moved:
            log.warning(
                "%s is another file than when this was interrupted (copied, restored or replaced): what was read of it "
                "is compared, and what differs is done anew",
                journal.moved[0],
            )
        try:
            with keeping(staging.root, remote=any_remote(inputs)):
                account = stream(
                    dict(files), staging.path, journal, allow_nonfinite=allow_nonfinite, every_tile=any_remote(inputs),
                    progress=progress,
                )  # fmt: skip
            if journal.moved:
                log.warning("%s of what was done are gone on with", f"{account.bytes_resumed:,} bytes")
        except DigestMismatch:
            staging.useless = True
            raise
        finally:
            journal.close()
        _complete(staging, account, beside, check)
    result.notes = [*result.notes, *account.findings]  # of this run, and so not of the account
    result.record(account.bytes_read, account.bytes_written, account.bytes_resumed, staging.manifest_sha256)
    result.lost_to_rounding = lost_in_all(account.figures)
    result.nonfinite = sum(seen.nonfinite for seen in account.figures.values())


def _complete(
    staging: Staging, account: Account, beside: Callable[[Path, Account], None], check: Callable[[Path], None] | None
) -> None:
    """What follows the weights: the files beside them, the check of the whole, and the digests that are known."""
    beside(staging.path, account)
    if check is not None:
        try:
            check(staging.path)
        except LapisError:
            staging.useless = True
            raise
    staging.digests.update(account.digests)
    staging.sizes.update(account.sizes)


def _produce_together(
    result: MergeResult,
    out: Path,
    named: JobName,
    files: Mapping[str, Sequence[Output]],
    inputs: Mapping[str, Checkpoint],
    recipe: Any,
    beside: Callable[[Path, Account], None],
    overwrite: bool,
    allow_nonfinite: bool,
    check: Callable[[Path], None] | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """`produce` by all processes that run this command; one of them commits, and all return when that is done."""
    content = [_job(inputs, files, [recipe, allow_nonfinite]), input_files(inputs)]
    key = hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
    folders = [checkpoint.root for checkpoint in inputs.values()]

    def finished() -> bool:
        return process_count() > 1 and is_output(out, inputs, recipe[0])

    job = SharedJob(out, "merge", named, key, None, partial(lay_out, files), finished, forget_digests)

    def seal(staging: Staging) -> None:
        account = account_of(job.journal, files)
        _complete(staging, account, beside, check)
        result.bytes_read, result.bytes_written = account.bytes_read, account.bytes_written

    if not finished():
        check_output(out, overwrite=overwrite, inputs=folders)
        write_together(job, files, allow_nonfinite=allow_nonfinite, progress=progress)
        finish(job, seal, overwrite=overwrite, inputs=folders)
    document = read_json(out / ACCOUNT)
    result.record(result.bytes_read, result.bytes_written, 0, sha256_of(out / MANIFEST))
    result.lost_to_rounding = document["lost_to_rounding"]
    result.nonfinite = sum(entry.get("nonfinite", 0) for entry in document["tensors"])


def is_output(out: Path, inputs: Mapping[str, Checkpoint], recipe: Any) -> bool:
    """Whether a folder was made from these inputs, as they are, by this recipe."""
    try:
        document, made = json.loads((out / ACCOUNT).read_bytes()), out.stat().st_ctime
        if document["recipe"] != json.loads(json.dumps(recipe, default=str)):
            return False
        same = document["inputs"] == {role: identity(checkpoint) for role, checkpoint in inputs.items()}
        files = {info.file for checkpoint in inputs.values() for info in checkpoint.index.values()}
        return same and all(file.stat().st_mtime <= made for file in files if file.exists())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def job_name(inputs: Mapping[str, Checkpoint], recipe: Any) -> JobName:
    """The job as a user knows it: the same command has the same, though the files of its inputs be others."""
    sources = {role: str(checkpoint.source) for role, checkpoint in inputs.items()}
    text = json.dumps([recipe, sources], sort_keys=True, default=str)
    return JobName(
        hashlib.sha256(text.encode()).hexdigest(), ", ".join(f"{role} {place}" for role, place in sources.items())
    )


def _job(inputs: Mapping[str, Checkpoint], files: Mapping[str, Sequence[Output]], recipe: Any) -> str:
    """A digest of all that decides the output's bytes besides the values of the inputs."""
    everything = [__version__, TILE, recipe, {role: checkpoint.digest() for role, checkpoint in inputs.items()}]
    total = hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode())
    for name, outputs in files.items():
        for output in outputs:
            sources = [(source.role, source.name, str(source.dtype), source.shape) for source in output.sources]
            total.update(f"{name} {output.name} {output.dtype} {output.shape} {sources}\n".encode())
            for part in (*output.sources, output.patch):
                total.update(str(getattr(part, "rows", "")).encode())  # which rows of tokens go where
    return total.hexdigest()


def input_files(inputs: Mapping[str, Checkpoint]) -> Identity:
    """Which files the inputs are: one that was replaced has another inode or change time, always.

    A file on a server is known by its sha256, or by what else its server tells a version by; with it stands what a user
    gives to have that version.
    """
    result: Identity = []
    for role, checkpoint in inputs.items():
        for file in sorted({info.file for info in checkpoint.index.values()}):
            if not file.exists():
                assert checkpoint.snapshot is not None
                version = checkpoint.snapshot.remote(file.name).version
                result.append([role, f"{checkpoint.source}: {file.name}", version, checkpoint.snapshot.pinned])
                continue
            status = file.stat()
            result.append([role, os.path.abspath(file), *stamp(status)])
    return result


def any_remote(inputs: Mapping[str, Checkpoint]) -> bool:
    """Whether any input is read from a server."""
    return any(checkpoint.by_ranges for checkpoint in inputs.values())


def check_unmoved(staging: Staging, inputs: Mapping[str, Checkpoint]) -> None:
    """Raises CheckpointError where a file on a server is another than when the job in `staging` was interrupted."""
    now = {(role, name): entry for role, name, *entry in input_files(inputs) if len(entry) == 2}
    for role, name, *entry in Journal.inputs_of(staging):
        version, *_ = now.get((role, name), [None])
        if len(entry) == 2 and version is not None and version != entry[0]:
            raise CheckpointError(
                f"{name} is another than when this was interrupted, at {entry[1]}; remove {staging.root} to begin "
                "again, with what is there now or with that"
            )


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """config.json with the dtype of its weights, in the fields that held one before."""
    result = dict(config)
    levels = language_levels(result)
    for level in levels:
        level |= {name: dtype for name in ("dtype", "torch_dtype") if name in level}
    named = any(name in level for level in levels for name in ("dtype", "torch_dtype"))
    return result if named else {**result, "torch_dtype": dtype}
