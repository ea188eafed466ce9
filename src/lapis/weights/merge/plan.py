"""What a merge will do, proved from headers, configs and tokenizers, and all problems listed at once.

A stage, that is a recipe whose output is an input of this one, is laid out in the same way and becomes a checkpoint
whose tensors are computed as they are read, or a folder that was written before (merge.py). Leaves out: the recipe's
grammar (recipes/), which tensors meet (placing.py) and how (layout.py), vocabularies (union.py), methods (methods/).
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from lapis.checkpoint import Checkpoint
from lapis.checkpoint.tensor_file import INDEX
from lapis.errors import CheckpointError, ConfigError, LapisError
from lapis.families import find
from lapis.text.tokenizer.folder import write_json
from lapis.text.tokenizer.vocabulary import open_vocabulary
from lapis.weights.account import Entry
from lapis.weights.checks import (
    UNRELATED,
    check_configs,
    check_parents,
    check_same_tokens,
    check_vocabularies,
    kinship,
)
from lapis.weights.config_fields import settled_tie
from lapis.weights.engine.outputs import Output, disk_bytes
from lapis.weights.engine.tiles import THREADS, TILE
from lapis.weights.fuse.opening import computed_checkpoint, open_each, open_model
from lapis.weights.matching import format_problems, refusals
from lapis.weights.merge.layout import Layout, sharded
from lapis.weights.merge.placing import place
from lapis.weights.merge.recipes.recipe import Recipe
from lapis.weights.merge.recipes.stages import RecipeLike, each_stage, open_recipe
from lapis.weights.merge.settings import chat_template, output_config, write_tokenizer
from lapis.weights.merge.statistics import open_statistics
from lapis.weights.merge.union import Words
from lapis.weights.options import Dtype, MergeOptions
from lapis.weights.tokenizer_files import copy_tokenizer_files, write_index, write_template


@dataclass
class MergePlan:
    """What a merge will do, proved before it runs.

    Attributes:
        recipe: What was asked for.
        inputs: The models and stages by their names in the recipe.
        owner: The one among them whose names and config the output has.
        files: Name -> tensors in order.
        entries: What becomes of every tensor.
        config: config.json of the output.
        donor: The model whose tokenizer files are taken.
        words: The output's vocabulary, where it is not the donor's.
        template: A chat template that the recipe asks for.
        notes: What a reader should know.
        kin: Each model, or for a stage the one whose names it has, as a checkpoint that lies on a disk.
        method_notes: What methods say of tensors, counted as they run.
        stages: What its inputs are made by, by name, those that others need first.
        models: Every model that is read from a disk, its stages' too.
    """

    recipe: Recipe
    inputs: dict[str, Checkpoint]
    owner: str
    files: dict[str, list[Output]]
    entries: list[Entry]
    config: dict[str, Any]
    donor: Checkpoint
    words: Words | None
    template: str | None
    notes: list[str]
    kin: dict[str, Checkpoint]
    method_notes: Counter[str] = field(default_factory=Counter)
    stages: dict[str, "MergePlan"] = field(default_factory=dict)
    models: dict[str, Checkpoint] = field(default_factory=dict)
    _beside: "tempfile.TemporaryDirectory[str] | None" = field(default=None, repr=False)

    @property
    def disk_bytes(self) -> int:
        return disk_bytes(self.files)

    @property
    def memory_bytes(self) -> int:
        """The bound on buffers: tiles, or whole tensors, and a bit for each element of the largest tensor's masks."""
        outputs = [output for each in self.files.values() for output in each]
        inputs = max((len(output.sources) for output in outputs), default=1)
        swept = [prod(o.shape) * len(o.sources) for o in outputs if o.kernel and o.kernel.passes]
        whole = [prod(o.shape) for o in outputs if o.kernel and o.kernel.whole]
        tile = max([TILE, *whole])
        return THREADS * tile * (16 * inputs + 20) + max(swept, default=0) // 8


def plan_merge(
    recipe: RecipeLike,
    seed: int | None = MergeOptions.seed,
    allow_unrelated: bool = MergeOptions.allow_unrelated,
    same_tokens: bool = MergeOptions.same_tokens,
    dtype: Dtype | None = MergeOptions.dtype,
    written: Mapping[str, Path] | None = None,
) -> MergePlan:
    """Checks a merge and lays it out; the arguments are those of `merge`.

    Args:
        written: Folders of stages that were written; the others are computed as they are read.

    Raises:
        ConfigError, CheckpointError: With all problems at once.
    """
    recipe = open_recipe(recipe)
    if dtype is not None:
        recipe = replace(recipe, dtype=dtype, written={**recipe.written, "out_dtype": dtype})
    opened: dict[str, Checkpoint] = {}
    kin: dict[str, Checkpoint] = {}
    stages: dict[str, MergePlan] = {}
    beside = tempfile.TemporaryDirectory(prefix="lapis-stages-") if recipe.stages else None
    for name, stage in each_stage(recipe):
        try:
            plan = _lay_out(stage, seed, allow_unrelated, same_tokens, opened, kin)
            if written and name in written:
                opened[name] = replace(open_model(written[name]), source=name)
            else:
                assert beside is not None
                opened[name] = _computed(name, plan, Path(beside.name) / name)
        except LapisError as error:
            raise type(error)(f"{name}: {error}") from None
        stages[name] = plan
        kin[name] = kin[plan.owner]
    plan = _lay_out(recipe, seed, allow_unrelated, same_tokens, opened, kin)
    plan.stages, plan._beside = stages, beside
    plan.models = {name: checkpoint for name, checkpoint in opened.items() if name not in stages}
    plan.notes += [f"{name}: {note}" for name, stage in stages.items() for note in stage.notes]
    return plan


def _computed(name: str, plan: MergePlan, folder: Path) -> Checkpoint:
    """The output of a stage as a checkpoint whose tensors are computed as they are read. folder: for what is beside."""
    folder.mkdir()
    write_beside(plan, folder)
    about = [plan.recipe.written, plan.recipe.seed, [checkpoint.digest() for checkpoint in plan.inputs.values()]]
    tensors = computed_checkpoint(plan.kin[plan.owner], plan.files, folder, about)
    return replace(
        tensors, source=name, root=folder, config=plan.config, family=find(plan.config), notes=[], snapshot=None
    )


@contextmanager
def as_checkpoint(plan: MergePlan) -> Iterator[Checkpoint]:
    """The output of a merge as a checkpoint whose tensors are computed as they are read; nothing is written of them."""
    with tempfile.TemporaryDirectory(prefix="lapis-merge-") as folder:
        yield _computed(str(plan.recipe.written.get("name") or "merge"), plan, Path(folder) / "model")


def _lay_out(
    recipe: Recipe,
    seed: int | None,
    allow_unrelated: bool,
    same_tokens: bool,
    opened: dict[str, Checkpoint],
    kin: dict[str, Checkpoint],
) -> MergePlan:
    """One stage. opened, kin: models by name, to which those that it reads are added."""
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    inputs, problems = _open(recipe, opened)
    statistics = _open_statistics(recipe, inputs, opened, problems)
    if problems:
        raise CheckpointError(format_problems("merge", problems))
    kin |= {model: inputs[model] for model in inputs if model not in kin}
    placing = place(recipe, inputs)
    problems += placing.problems
    notes = list(recipe.notes)
    for role, checkpoint in inputs.items():
        notes += [f"{role}: {line}" for line in checkpoint.notes]
    more, lines = check_configs(inputs, placing.owner)
    problems, notes = more + problems, notes + lines
    words = {model: open_vocabulary(checkpoint) for model, checkpoint in inputs.items()}
    layout = Layout(recipe, inputs, placing, words, statistics)
    more, lines = check_same_tokens(inputs, words, same_tokens)
    problems, notes = problems + more, notes + lines
    problems += check_vocabularies(inputs, words) + layout.check_vocabularies()
    if not problems:
        problems, lines = _check_parents(recipe, kin, allow_unrelated)
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
    placed = sorted((output for output in outputs if output), key=lambda output: _position(output, inputs))
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
        recipe, inputs, placing.owner, sharded(placed), entries, config, donor, layout.words, template, notes,
        kin, layout.method_notes,
    )  # fmt: skip


def _open(recipe: Recipe, opened: dict[str, Checkpoint]) -> tuple[dict[str, Checkpoint], list[str]]:
    models = {model: model for model in recipe.models if model not in opened}
    more, refused = open_each(models)
    opened |= more
    problems = refusals(models, refused)
    return {model: opened[model] for model in recipe.models if model in opened}, problems


def _open_statistics(
    recipe: Recipe, inputs: Mapping[str, Checkpoint], opened: dict[str, Checkpoint], problems: list[str]
) -> dict[str, Checkpoint]:
    """What was gathered of the models, by model; added to `opened`, since it decides the output as they do."""
    result: dict[str, Checkpoint] = {}
    for each in recipe.slices:
        for entry in each.inputs:
            if entry.statistics is not None and entry.model in inputs and entry.model not in result:
                try:
                    held = open_statistics(entry.statistics, recipe.method.statistics, inputs[entry.model])
                    result[entry.model] = opened[f"statistics of {entry.model}"] = held
                except CheckpointError as error:
                    problems.append(str(error))
    return result


def _check_parents(
    recipe: Recipe, models: Mapping[str, Checkpoint], allow_unrelated: bool
) -> tuple[list[str], list[str]]:
    """Where differences are taken, that both sides are related; where models are averaged, a note if they are not."""
    differences: dict[tuple[str, str], None] = {}
    averaged: dict[tuple[str, str], None] = {}
    for each in recipe.slices:
        base = each.base or recipe.base
        names = [entry.model for entry in each.inputs]
        negative = [e.model for e in each.inputs if _is_negative(e.parameters.get("weight"))]
        if recipe.method.takes_differences and base in names:
            differences |= {(base, model): None for model in names if model != base}
        elif recipe.method.name != "passthrough":
            pairs = {(names[0], model): None for model in names[1:]}
            if negative:
                differences |= {(one, other): None for one in negative for other in names if other not in negative}
            else:
                averaged |= pairs
    problems, notes = check_parents(
        [(a, models[a], b, models[b]) for a, b in differences if models[a] is not models[b]], allow_unrelated
    )
    for one, other in averaged.keys() - differences.keys():
        cosine, _ = kinship(models[one], models[other])
        if cosine is not None and cosine < UNRELATED:
            notes.append(f"{one} and {other} are unrelated: the cosine of their weights is {cosine:.2f}")
    return problems, notes


def _position(output: Output, inputs: Mapping[str, Checkpoint]) -> tuple[str, str, int]:
    """Where the first source of an output lies, so that models are read from their start to their end."""
    if not output.sources:
        return "", "", 0
    first = output.sources[0]
    info = inputs[first.role].info(first.name)
    return first.role, info.file.name, info.start


def _is_negative(weight: Any) -> bool:
    return isinstance(weight, (int, float)) and weight < 0


def write_beside(plan: MergePlan, folder: Path) -> None:
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
