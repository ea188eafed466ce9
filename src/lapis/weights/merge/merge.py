"""A merge: a recipe in, a model folder out, streamed and resumable. No model is ever built.

Everything is checked first, from headers, configs and tokenizers, and all problems are listed at once. Leaves out: the
recipe's grammar (recipe.py), which tensors meet (placing.py) and how (layout.py), vocabularies (union.py), the methods
(methods/), the engine (stream.py).
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.tensor_file import INDEX
from lapis.errors import CheckpointError, ConfigError
from lapis.text.tokenizer.folder import write_json
from lapis.text.tokenizer.vocabulary import open_vocabulary
from lapis.weights.checks import (
    UNRELATED,
    check_configs,
    check_parents,
    check_same_tokens,
    check_vocabularies,
    kinship,
)
from lapis.weights.config_fields import settled_tie
from lapis.weights.engine.job import Entry, MergeResult, count, disk_bytes, produce, write_account
from lapis.weights.engine.outputs import Account, Output
from lapis.weights.engine.tiles import THREADS, TILE
from lapis.weights.fuse.opening import open_model
from lapis.weights.matching import format_problems
from lapis.weights.merge.expression import parse_expression
from lapis.weights.merge.layout import Layout, sharded
from lapis.weights.merge.placing import place
from lapis.weights.merge.recipe import Recipe, parse_recipe, read_recipe
from lapis.weights.merge.settings import chat_template, output_config, write_tokenizer
from lapis.weights.merge.union import Words
from lapis.weights.options import Dtype, MergeOptions
from lapis.weights.tokenizer_files import copy_tokenizer_files, write_index, write_template


@dataclass
class MergePlan:
    """What a merge will do, proved before it runs.

    Attributes:
        recipe: What was asked for.
        inputs: The models by their names in the recipe.
        files: Name -> tensors in order.
        entries: What becomes of every tensor.
        config: config.json of the output.
        donor: The model whose tokenizer files are taken.
        words: The output's vocabulary, where it is not the donor's.
        template: A chat template that the recipe asks for.
        notes: What a reader should know.
        method_notes: What methods say of tensors, counted as they run.
    """

    recipe: Recipe
    inputs: dict[str, Checkpoint]
    files: dict[str, list[Output]]
    entries: list[Entry]
    config: dict[str, Any]
    donor: Checkpoint
    words: Words | None
    template: str | None
    notes: list[str]
    method_notes: Counter[str] = field(default_factory=Counter)

    @property
    def disk_bytes(self) -> int:
        return disk_bytes(self.files)

    @property
    def memory_bytes(self) -> int:
        """The bound on buffers: tiles, and a bit for each element of the largest tensor's masks."""
        outputs = [output for each in self.files.values() for output in each]
        inputs = max((len(output.sources) for output in outputs), default=1)
        swept = [prod(o.shape) * len(o.sources) for o in outputs if o.kernel and o.kernel.passes]
        return THREADS * TILE * (16 * inputs + 20) + max(swept, default=0) // 8


def merge(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    seed: int | None = MergeOptions.seed,
    allow_unrelated: bool = MergeOptions.allow_unrelated,
    same_tokens: bool = MergeOptions.same_tokens,
    dtype: Dtype | None = MergeOptions.dtype,
    overwrite: bool = MergeOptions.overwrite,
    allow_nonfinite: bool = MergeOptions.allow_nonfinite,
    dry_run: bool = MergeOptions.dry_run,
    progress: Callable[[int, int], None] | None = None,
) -> MergeResult:
    """Writes the merge that a recipe describes as a model folder. Goes on where a killed run of it stopped.

    Args:
        recipe: A YAML file in mergekit's format, its content as a mapping, or a line such as "A + 0.8*(B - C)".
        out: A new folder.
        seed: This and the options after it are those of `lapis.weights.options.MergeOptions`.
        progress: Called with (done, total) in bytes of output.

    Returns:
        What was done to the tensors, what was read and written, and notes.

    Raises:
        ConfigError, CheckpointError: With all problems at once, before the work begins.
        OutputError: Where `out` cannot be written.
    """
    started = time.perf_counter()
    plan = plan_merge(recipe, seed, allow_unrelated, same_tokens, dtype)
    needs = {"disk_bytes": plan.disk_bytes, "memory_bytes": plan.memory_bytes}
    result = MergeResult(str(out), count(plan.entries), needs=needs, notes=plan.notes, dry_run=dry_run)

    def beside(folder: Path, account: Account) -> None:
        _write_beside(plan, folder)
        write_account(
            folder, "merge", plan.recipe.written, plan.inputs, plan.entries, account.figures, plan.notes,
            seed=plan.recipe.seed,
        )  # fmt: skip

    tokens = sorted(plan.words.ids.items()) if plan.words else None
    produce(
        result, plan.files, plan.inputs, [plan.recipe.written, plan.recipe.seed, tokens], beside,
        overwrite=overwrite, allow_nonfinite=allow_nonfinite, progress=progress,
    )  # fmt: skip
    result.notes = plan.notes + [f"{number:,} tensors {what}" for what, number in sorted(plan.method_notes.items())]
    result.seconds = time.perf_counter() - started
    return result


def open_recipe(recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str]) -> Recipe:
    """A recipe from whatever a user gives: a file, a mapping, or a one-line sum of models."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return parse_recipe(recipe)
    text = os.fspath(recipe)
    return read_recipe(text) if text.endswith((".yaml", ".yml")) or os.path.isfile(text) else parse_expression(text)


def plan_merge(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    seed: int | None = MergeOptions.seed,
    allow_unrelated: bool = MergeOptions.allow_unrelated,
    same_tokens: bool = MergeOptions.same_tokens,
    dtype: Dtype | None = MergeOptions.dtype,
) -> MergePlan:
    """Checks a merge and lays it out; the arguments are those of `merge`.

    Raises:
        ConfigError, CheckpointError: With all problems at once.
    """
    recipe = open_recipe(recipe)
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    if dtype is not None:
        recipe = replace(recipe, dtype=dtype, written={**recipe.written, "out_dtype": dtype})
    inputs, problems = _open(recipe)
    if problems:
        raise CheckpointError(format_problems("merge", problems))
    placing = place(recipe, inputs)
    problems += placing.problems
    notes = list(recipe.notes)
    for role, checkpoint in inputs.items():
        notes += [f"{role}: {line}" for line in checkpoint.notes]
    more, lines = check_configs(inputs, placing.owner)
    problems, notes = more + problems, notes + lines
    words = {model: open_vocabulary(checkpoint) for model, checkpoint in inputs.items()}
    layout = Layout(recipe, inputs, placing, words)
    more, lines = check_same_tokens(inputs, words, same_tokens)
    problems, notes = problems + more, notes + lines
    problems += check_vocabularies(inputs, words) + layout.check_vocabularies()
    if not problems:
        problems, lines = _check_parents(recipe, inputs, allow_unrelated)
        notes += lines
    outputs = [layout.output(each) for each in placing.placed] if not problems else []
    problems += layout.problems
    if placing.placed and not placing.problems:
        names = {name for each in placing.placed for _, name in each.sources}
        problems += layout.resolver.problems(names | {each.name for each in placing.placed})
    donor = inputs[layout.words.donor if layout.words else placing.owner]
    try:
        template = chat_template(recipe.chat_template, words, donor)
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise CheckpointError(format_problems("merge", problems))
    placed = [output for output in outputs if output]
    config, changed = output_config(inputs[placing.owner], donor, placing, placed, recipe.dtype)
    if any(inputs[placing.owner].part(output.name).component == "head" for output in placed):
        config, untied = settled_tie(config, inputs)
        changed += untied
    notes += placing.notes + layout.resolver.notes() + layout.notes + changed
    entries = layout.entries + [
        Entry(name, "skipped", why, role=model) for (model, name), why in placing.unused.items()
    ]
    if recipe.method.seeded:
        notes.append(f"masks were drawn from seed {recipe.seed}, the tensor's name and the model's place")
    return MergePlan(
        recipe, inputs, sharded(placed), entries, config, donor, layout.words, template, notes, layout.method_notes
    )


def _open(recipe: Recipe) -> tuple[dict[str, Checkpoint], list[str]]:
    inputs, problems = {}, []
    for model in recipe.models:
        try:
            inputs[model] = open_model(model)
        except CheckpointError as error:
            problems.append(str(error))
    return inputs, problems


def _check_parents(
    recipe: Recipe, inputs: Mapping[str, Checkpoint], allow_unrelated: bool
) -> tuple[list[str], list[str]]:
    """Where differences are taken, that both sides are related; where models are averaged, a note if they are not."""
    differences: dict[tuple[str, str], None] = {}
    averaged: dict[tuple[str, str], None] = {}
    for each in recipe.slices:
        base = each.base or recipe.base
        models = [entry.model for entry in each.inputs]
        negative = [e.model for e in each.inputs if _is_negative(e.parameters.get("weight"))]
        if recipe.method.takes_differences and base in models:
            differences |= {(base, model): None for model in models if model != base}
        elif recipe.method.name != "passthrough":
            pairs = {(models[0], model): None for model in models[1:]}
            if negative:
                differences |= {(one, other): None for one in negative for other in models if other not in negative}
            else:
                averaged |= pairs
    problems, notes = check_parents([(a, inputs[a], b, inputs[b]) for a, b in differences], allow_unrelated)
    for one, other in averaged.keys() - differences.keys():
        cosine, _ = kinship(inputs[one], inputs[other])
        if cosine is not None and cosine < UNRELATED:
            notes.append(f"{one} and {other} are unrelated: the cosine of their weights is {cosine:.2f}")
    return problems, notes


def _is_negative(weight: Any) -> bool:
    return isinstance(weight, (int, float)) and weight < 0


def _write_beside(plan: MergePlan, folder: Path) -> None:
    """Everything that is not a weight: tokenizer and generation settings of the donor, config, index."""
    plan.notes += copy_tokenizer_files(plan.donor, folder)
    write_json(folder / "config.json", plan.config)
    if plan.words and plan.words.document:
        write_tokenizer(folder, plan.words.document)
    if plan.template:
        write_template(folder, plan.template)
    (folder / INDEX).unlink(missing_ok=True)
    if len(plan.files) > 1:
        write_index(folder, plan.files)
