"""From a recipe to the tensors of the output: what each is made from, in which order, under which name.

Layers are renumbered where slices stack them. What lies before the layers comes from the first slice's inputs, what
lies after them from the last's. Reads no weights. Leaves out: vocabularies (union.py), arithmetic (kernels.py).
"""

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lapis.checkpoint import Checkpoint
from lapis.families.base import Part
from lapis.weights.engine.fp8 import is_scale
from lapis.weights.matching import counterparts
from lapis.weights.merge.recipes.recipe import Input, Recipe, Slice
from lapis.wording import format_count


@dataclass(frozen=True)
class Placed:
    """One tensor of the output. t: the layer's place in its slice, 0 to 1; None outside the layers.

    sources: each input of the slice with the tensor's name in it, in the recipe's order. tower: where the tensor is not
    the language model's ("vision_tower"); it is then copied from the one source.
    """

    name: str
    part: Part
    within: Slice
    base: str | None
    t: float | None
    sources: tuple[tuple[Input, str], ...]
    tower: str = ""


@dataclass
class Placing:
    """All tensors of the output in the order in which they are written, and what became of the others.

    owner: the model whose config the output has. unused: (model, tensor) -> why it is not taken. layers: for each layer
    of the output its layer in the owner of its names, for lists in config.json that run over layers.
    """

    owner: str
    placed: list[Placed] = field(default_factory=list)
    unused: dict[tuple[str, str], str] = field(default_factory=dict)
    layers: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def place(recipe: Recipe, models: Mapping[str, Checkpoint]) -> Placing:
    """Lays the output out. Every tensor of every model is placed, or listed in `unused` or `problems`."""
    result = Placing(recipe.base or recipe.slices[0].inputs[0].model)
    tables = {model: _by_layer(checkpoint) for model, checkpoint in models.items()}
    slices = [_with_layers(each, tables, result.problems) for each in recipe.slices]
    if result.problems:
        return result
    before, after = _Slot(recipe, models, slices[0]), _Slot(recipe, models, slices[-1])
    outside = tables[before.reference][None], tables[after.reference][None]
    for name in outside[0]:
        if models[before.reference].part(name).component.startswith("embed"):
            before.put(result, name, None, None, None)
    for each in slices:
        slot = _Slot(recipe, models, each)
        spans = {entry.model: entry.layers or (0, 0) for entry in each.inputs}
        first, last = spans[slot.reference]
        for i in range(last - first):
            offsets = {model: span[0] + i for model, span in spans.items()}
            t = i / (last - first - 1) if last - first > 1 else 1.0
            for name in tables[slot.reference][first + i]:
                slot.put(result, name, len(result.layers), offsets, t)
            result.layers.append(first + i)
    for name in outside[1]:
        if not models[after.reference].part(name).component.startswith("embed"):
            after.put(result, name, None, None, None)
    _account_for_the_rest(result, models, slices)
    copied = Counter((each.tower, each.sources[0][0].model) for each in result.placed if each.tower)
    for (tower, model), count in copied.items():
        what = format_count(count, f"tensor of {tower} is", f"tensors of {tower} are")
        result.notes.append(f"{what} copied from {model}: merged is the language model")
    return result


@dataclass
class _Slot:
    """A slice at work: its inputs, and the one among them whose names the output takes."""

    recipe: Recipe
    models: Mapping[str, Checkpoint]
    within: Slice

    def __post_init__(self) -> None:
        self.base = self.within.base or self.recipe.base
        inputs = [entry.model for entry in self.within.inputs]
        self.reference = self.base if self.base in inputs else inputs[0]
        owner = self.models[self.reference]
        self.names = {model: counterparts(owner, self.models[model]) for model in inputs}
        self.parts = {
            model: {self.models[model].part(name): name for name in reversed(self.models[model].names)}
            for model in inputs
        }
        self.inner = {
            model: {self.models[model].towers.inner(name): name for name in self.models[model].names}
            for model in inputs
        }

    def put(
        self, result: Placing, name: str, layer: int | None, offsets: Mapping[str, int] | None, t: float | None
    ) -> None:
        """Adds the tensor that the reference calls `name`, or the problem that an input lacks it."""
        owner = self.models[self.reference]
        if why := _no_weight(owner, name):
            result.unused[self.reference, name] = why
            return
        part, sources = owner.part(name), []
        if tower := owner.towers.others.get(name):
            own = next(entry for entry in self.within.inputs if entry.model == self.reference)
            result.placed.append(Placed(name, part, self.within, self.base, None, ((own, name),), tower))
            return
        for entry in self.within.inputs:
            if offsets is None:
                other = self.names[entry.model].get(name)
                expected = name
            else:
                expected = renumbered(name, offsets[self.reference], offsets[entry.model])
                inner = renumbered(owner.towers.inner(name) or name, offsets[self.reference], offsets[entry.model])
                same = Part(offsets[entry.model], part.component, part.kind)
                other = expected if expected in self.models[entry.model].index else self.inner[entry.model].get(inner)
                other = other or self.parts[entry.model].get(same)
            if other is None:
                model = self.models[entry.model]
                result.problems.append(f"{expected} is not in {entry.model}; {_near(expected, model)}")
            else:
                sources.append((entry, other))
        if offsets is not None and layer is not None:
            name = renumbered(name, offsets[self.reference], layer)
            part = Part(layer, part.component, part.kind)
        result.placed.append(Placed(name, part, self.within, self.base, t, tuple(sources)))


def renumbered(name: str, old: int, new: int) -> str:
    """A tensor's name with its layer's number replaced."""
    return name if old == new else re.sub(rf"(?<![^.]){old}(?=\.)", str(new), name, count=1)


def _by_layer(checkpoint: Checkpoint) -> dict[int | None, list[str]]:
    """Names by layer in the order of the files; None holds what lies outside the layers, and is always there."""
    result: dict[int | None, list[str]] = {None: []}
    for name in sorted(checkpoint.names, key=lambda n: (checkpoint.info(n).file.name, checkpoint.info(n).start)):
        result.setdefault(checkpoint.part(name).layer, []).append(name)
    return result


def _with_layers(each: Slice, tables: Mapping[str, dict[int | None, list[str]]], problems: list[str]) -> Slice:
    """The slice with the range of each input written out; all must hold the same number of layers."""
    inputs = []
    for entry in each.inputs:
        count = sum(layer is not None for layer in tables[entry.model])
        first, last = entry.layers or (0, count)
        missing = [layer for layer in range(first, last) if layer not in tables[entry.model]]
        if missing:
            problems.append(
                f"{entry.model} has no layer {missing[0]}; it has {count}, and [{first}, {last}) is asked for"
            )
        inputs.append(replace(entry, layers=(first, last)))
    lengths = {entry.model: entry.layers[1] - entry.layers[0] for entry in inputs if entry.layers}
    if len(set(lengths.values())) > 1:
        spelled = ", ".join(f"{count} in {model}" for model, count in lengths.items())
        problems.append(f"the number of layers differs: {spelled}; pick layers with slices")
    return Slice(tuple(inputs), each.base, each.parameters)


def _account_for_the_rest(result: Placing, models: Mapping[str, Checkpoint], slices: list[Slice]) -> None:
    """Tensors that are not placed: a reason each, or a problem where a picked layer has more than the others."""
    taken = {(entry.model, name) for placed in result.placed for entry, name in placed.sources}
    picked: dict[str, set[int]] = {}
    for each in slices:
        for entry in each.inputs:
            picked.setdefault(entry.model, set()).update(range(*(entry.layers or (0, 0))))
    ends = {entry.model for each in (slices[0], slices[-1]) for entry in each.inputs}
    for model, checkpoint in models.items():
        for name in checkpoint.names:
            if (model, name) in taken or (model, name) in result.unused:
                continue
            part = checkpoint.part(name)
            if why := _no_weight(checkpoint, name):
                pass
            elif model not in picked:
                why = "the model gives its config and tokenizer only"
            elif tower := checkpoint.towers.others.get(name):
                why = f"{tower} is not the language model, which is what is merged"
            elif part.layer is not None and part.layer not in picked[model]:
                why = "its layer is not picked"
            elif part.layer is None and (len(slices) > 1 or model not in ends):
                why = "what lies outside the layers comes from the first and the last slice"
            elif part.component == "head":
                why = "the output's head is tied to its embedding"
            else:
                lacking = next(other for other in models if other != model) if len(models) > 1 else result.owner
                result.problems.append(f"{name} of {model} is not in {lacking}; {_near(name, models[lacking])}")
                continue
            result.unused[model, name] = why


def _no_weight(checkpoint: Checkpoint, name: str) -> str:
    """Why a tensor is no weight to merge; empty where it is one."""
    if is_scale(checkpoint, name):
        return "scales of an FP8 weight, which is written dequantized"
    ignored = checkpoint.family is not None and checkpoint.family.is_ignored(name)
    return "a buffer that models compute themselves" if ignored else ""


def _near(name: str, checkpoint: Checkpoint) -> str:
    close = difflib.get_close_matches(name, checkpoint.names, n=1, cutoff=0.6)
    return f"the nearest there is {close[0]}" if close else "nothing there is near"
