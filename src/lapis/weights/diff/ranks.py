"""A comparison that is kept as a folder, made by one process or several that divide it (checkpoint/sharing.py).

Each process measures runs of tensors; what it saw of them lies in the journal as numbers, and one process writes the
table of all. A process that comes when all is done reads the numbers from the folder. Leaves out: what is measured
(pairs.py).
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from lapis import __version__
from lapis.checkpoint.commit import check_output
from lapis.checkpoint.sharing import SharedJob, clear, finish, joined, process_count, share_parts
from lapis.checkpoint.staging import Staging, disk_errors
from lapis.errors import LapisError
from lapis.parsing import finite_json
from lapis.text.tokenizer.folder import write_json
from lapis.weights.account import identity
from lapis.weights.diff.pairs import Comparison, TensorPair
from lapis.weights.diff.table import DiffTable
from lapis.weights.engine.job import input_files, job_name
from lapis.weights.engine.ranks import PART

TABLE, SUMS = "diff.json", "sums.json"  # what `lapis diff --json` prints; what it was computed from


def compare_together(
    comparison: Comparison, settings: Mapping[str, Any], made: Callable[[], DiffTable], out: Path, *, overwrite: bool
) -> DiffTable:
    """Measures what nobody has measured yet, and puts the table at `out` unless another process does.

    Args:
        comparison: Of which nothing is measured.
        settings: What decides the table besides the models.
        made: The table, once all is measured.
        out: A new folder, absolute.
        overwrite: Replace one that is there.

    Raises:
        CheckpointError: For NaN and Inf, by every process; and for models that have nothing to do with each other.
        OutputError: Where `out` cannot be written.
    """
    models = comparison.models
    about = {"lapis": __version__, **settings, "inputs": {role: identity(model) for role, model in models.items()}}
    stamps = json.dumps([about, input_files(models)], default=str)
    parts = _parts(comparison.pairs)

    def finished() -> bool:
        try:
            return process_count() > 1 and bool(json.loads((out / SUMS).read_bytes())["of"] == about)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    job = SharedJob(
        out, "diff", job_name(models, settings), hashlib.sha256(stamps.encode()).hexdigest(), None,
        lambda staging: None, finished,
    )  # fmt: skip

    def do(number: int) -> Any:
        if number == len(parts):
            return comparison.turn()
        comparison.measure(parts[number])
        return [pair.to_json() for pair in parts[number]]

    def gathered() -> list[Any]:
        return [json.loads((job.journal / f"{number}.json").read_bytes()) for number in range(len(parts) + 1)]

    def seal(staging: Staging) -> None:
        seen = gathered()
        _take_up(comparison, parts, seen)
        write_json(staging.path / TABLE, finite_json(made().to_json() | {"of": about}))
        (staging.path / SUMS).write_text(json.dumps({"of": about, "parts": seen}))

    if not finished():
        check_output(out, overwrite=overwrite, inputs=[model.root for model in models.values()])
        try:
            with disk_errors(out), joined(job) as there:
                if there:
                    share_parts(job.journal, len(parts) + 1, do, lambda done: None)
                    _take_up(comparison, parts, gathered())
                    made().check_related(*(model.source for model in models.values()))
        except LapisError:
            clear(job)
            raise
        finish(job, seal, overwrite=overwrite, inputs=[model.root for model in models.values()])
    _take_up(comparison, parts, json.loads((out / SUMS).read_bytes())["parts"])
    return made()


def _parts(pairs: Sequence[TensorPair]) -> list[list[TensorPair]]:
    """The pairs in runs of at least PART bytes of b."""
    parts: list[list[TensorPair]] = [[]]
    size = 0
    for pair in pairs:
        if size >= PART:
            parts.append([])
            size = 0
        parts[-1].append(pair)
        size += prod(pair.b.shape) * pair.b.dtype.itemsize
    return parts


def _take_up(comparison: Comparison, parts: Sequence[Sequence[TensorPair]], seen: Sequence[Any]) -> None:
    """Fills in what all processes have seen."""
    for part, values in zip(parts, seen, strict=False):
        for pair, value in zip(part, values, strict=True):
            pair.read_json(value)
    comparison.directions, comparison.notes = seen[-1]
