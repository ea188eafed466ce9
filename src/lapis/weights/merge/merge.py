"""A merge: a recipe in, a model folder out, streamed and resumable. No model is ever built.

Everything is checked first (plan.py). A recipe in stages needs no more disk than its output where its stages' tensors
can be computed as they are read within `stage_memory`; a stage that cannot is written first, as a model beside the
output, and is there for a rerun until the output is in its place.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.commit import check_output
from lapis.checkpoint.sharing import process_count
from lapis.checkpoint.staging import is_made
from lapis.errors import LapisError
from lapis.weights.account import count, write_account
from lapis.weights.engine.job import MergeResult, input_files, is_output, produce
from lapis.weights.engine.outputs import Account
from lapis.weights.merge.mixture.gates import StatesOf
from lapis.weights.merge.mixture.mixture import merge_experts
from lapis.weights.merge.mixture.recipe import open_mixture
from lapis.weights.merge.plan import MergePlan, plan_merge, write_beside
from lapis.weights.merge.recipes.stages import RecipeLike, open_recipe
from lapis.weights.options import Dtype, MergeOptions
from lapis.wording import format_count


def merge(
    recipe: RecipeLike,
    out: str | os.PathLike[str],
    *,
    seed: int | None = MergeOptions.seed,
    allow_unrelated: bool = MergeOptions.allow_unrelated,
    same_tokens: bool = MergeOptions.same_tokens,
    dtype: Dtype | None = MergeOptions.dtype,
    overwrite: bool = MergeOptions.overwrite,
    allow_nonfinite: bool = MergeOptions.allow_nonfinite,
    dry_run: bool = MergeOptions.dry_run,
    stage_memory: float = MergeOptions.stage_memory,
    states: StatesOf | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Writes the merge that a recipe describes as a model folder. Goes on where a killed run of it stopped.

    Args:
        recipe: A YAML file in mergekit's format, its content as a mapping, or a line such as "A + 0.8*(B - C)".
        out: A new folder.
        seed: This and the options after it are those of `lapis.weights.options.MergeOptions`.
        states: Of a mixture of experts whose gate_mode is hidden: what runs the base, `lapis.prompt_states`.
        progress: Called with (done, total) in bytes of output.

    Returns:
        What was done to the tensors, what was read and written, and notes.

    Raises:
        ConfigError, CheckpointError: With all problems at once, before the work begins.
        OutputError: Where `out` cannot be written.
    """
    started = time.perf_counter()
    if (mixture := open_mixture(recipe)) is not None:
        mixture = replace(mixture, seed=mixture.seed if seed is None else seed, dtype=dtype or mixture.dtype)
        return merge_experts(
            mixture, out, overwrite=overwrite, allow_nonfinite=allow_nonfinite, dry_run=dry_run, states=states,
            progress=progress,
        )  # fmt: skip
    recipe, place = open_recipe(recipe), Path(os.path.abspath(out))
    written: dict[str, Path] = {}
    lines: list[str] = []
    plan: MergePlan | None = None
    while True:
        try:
            plan = plan_merge(recipe, seed, allow_unrelated, same_tokens, dtype, written)
            names = too_large(plan, stage_memory, written)
            if dry_run or not names or _made_by_others(plan, place):
                break
            check_output(place, overwrite=overwrite, inputs=[model.root for model in plan.models.values()])
            written[names[0]] = _write_stage(plan, names[0], place, allow_nonfinite, progress)
        except (LapisError, OSError):
            if plan is None or not _made_by_others(plan, place):
                raise
            plan, written = None, {}  # whoever put the output into place removed the stages, which are needed no more
    for name in names or written:
        need = plan.stages[name].memory_bytes / 1e9
        lines.append(
            f"{name} is written first and read from the disk: computing it as it is read takes {need:,.2f} GB, and "
            f"stage_memory is {stage_memory:g} GB"
        )
    needs = {
        "disk_bytes": plan.disk_bytes + sum(plan.stages[name].disk_bytes for name in names),
        "memory_bytes": plan.memory_bytes
        + sum(stage.memory_bytes for name, stage in plan.stages.items() if name not in written and name not in names),
    }
    result = MergeResult(str(out), count(plan.entries), needs=needs, notes=plan.notes, dry_run=dry_run)
    _produce(result, plan, plan.models, overwrite, allow_nonfinite, progress)
    counted = [f"{format_count(number, 'tensor')} {what}" for what, number in sorted(plan.method_notes.items())]
    result.notes = [*result.notes, *counted, *lines]
    if plan.stages and not dry_run:
        shutil.rmtree(_stages_of(place), ignore_errors=True)
    result.seconds = time.perf_counter() - started
    return result


def too_large(plan: MergePlan, stage_memory: float, written: Mapping[str, Path]) -> list[str]:
    """The stages that are not computed as they are read, since that takes more memory than there may be, in GB."""
    names, left = [], stage_memory * 1e9
    for name, stage in plan.stages.items():
        if name not in written:
            if stage.memory_bytes > left:
                names.append(name)
            else:
                left -= stage.memory_bytes
    return names


def _made_by_others(plan: MergePlan, out: Path) -> bool:
    """Whether another process of this job has put the output into place."""
    return process_count() > 1 and is_output(out, plan.models, plan.recipe.written)


def _stages_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.stages")


def _write_stage(
    plan: MergePlan, name: str, out: Path, allow_nonfinite: bool, progress: Callable[[int, int], None] | None
) -> Path:
    """A stage as a model folder beside the output; one that is there from an interrupted run is taken as it is."""
    stage = plan.stages[name]
    digests = {model: checkpoint.digest() for model, checkpoint in plan.models.items()}
    about = [plan.recipe.written, stage.recipe.seed, digests, input_files(plan.models), allow_nonfinite]
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
    folder = _stages_of(out) / f"{name}-{key}"
    if not is_made(folder):
        result = MergeResult(str(folder), {}, needs={"disk_bytes": stage.disk_bytes})
        _produce(result, stage, plan.models, False, allow_nonfinite, progress)
    return folder


def _produce(
    result: MergeResult,
    plan: MergePlan,
    models: Mapping[str, Checkpoint],
    overwrite: bool,
    allow_nonfinite: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Writes what was laid out to result.out. models: all that is read from a disk."""

    def beside(folder: Path, account: Account) -> None:
        write_beside(plan, folder)
        write_account(
            folder, "merge", plan.recipe.written, models, plan.entries, account.figures, plan.notes,
            seed=plan.recipe.seed,
        )  # fmt: skip

    tokens = sorted(plan.words.ids.items()) if plan.words else None
    produce(
        result, plan.files, models, [plan.recipe.written, plan.recipe.seed, tokens], beside,
        overwrite=overwrite, allow_nonfinite=allow_nonfinite, progress=progress,
    )  # fmt: skip
