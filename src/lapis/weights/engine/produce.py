"""The one way a graft or merge becomes a folder: staged, journaled, streamed, described, committed.

Leaves out: what is computed (outputs.py), how (stream.py), and the rules of staging (checkpoint/commit.py).
"""

import hashlib
import json
import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lapis import __version__
from lapis.checkpoint import Checkpoint
from lapis.checkpoint.commit import commit
from lapis.weights.engine.account import MergeResult, lost_in_all
from lapis.weights.engine.journal import Journal
from lapis.weights.engine.outputs import Account, Output
from lapis.weights.engine.stream import stream
from lapis.weights.engine.tiles import TILE


def produce(
    result: MergeResult,
    files: Mapping[str, Sequence[Output]],
    inputs: Mapping[str, Checkpoint],
    recipe: Any,
    beside: Callable[[Path, Account], None],
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the files of a model and commits them at result.out; fills in what was measured.

    recipe: all that decides the output besides the inputs, as JSON; a journal of another recipe is not gone on with.
    beside(folder, account): writes what is not a weight. result.needs["disk_bytes"] must be free.
    """
    folders = [checkpoint.root for checkpoint in inputs.values()]
    with commit(
        result.out, overwrite=overwrite, needs_bytes=result.needs["disk_bytes"], inputs=folders, resumable=True
    ) as staging:
        journal = Journal(staging.path, _job(inputs, [recipe, allow_nonfinite]))
        try:
            account = stream(dict(files), staging.path, journal, allow_nonfinite=allow_nonfinite, progress=progress)
        finally:
            journal.close()
        beside(staging.path, account)
        staging.digests.update(account.digests)
    result.bytes_read, result.bytes_written = account.bytes_read, account.bytes_written
    result.bytes_resumed = account.bytes_resumed
    result.lost_to_rounding = lost_in_all(account.figures)
    result.nonfinite = sum(seen.nonfinite for seen in account.figures.values())
    result.sha256 = staging.manifest_sha256
    result.peak_memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _job(inputs: Mapping[str, Checkpoint], recipe: Any) -> str:
    """A digest of all that decides the output's bytes: version, tiles, recipe, and which files were read."""
    stamps = {}
    for role, checkpoint in inputs.items():
        files = sorted({info.file for info in checkpoint.index.values()})
        stamps[role] = [checkpoint.digest(), [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]]
    everything = [__version__, TILE, recipe, stamps]
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()
