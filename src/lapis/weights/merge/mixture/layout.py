"""The tensors of a mixture: each one's place in the base, in an expert, or in the gates, proved from headers."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lapis.checkpoint import Checkpoint
from lapis.errors import CheckpointError, ConfigError
from lapis.families import ModelConfig, find
from lapis.families.base import Family, Part
from lapis.families.config import Experts
from lapis.families.fields import MOST_LAYERS
from lapis.parsing import quoted
from lapis.weights.account import Entry
from lapis.weights.checks import UNRELATED, check_sizes, kinship
from lapis.weights.config_fields import settled_tie
from lapis.weights.engine.fp8 import is_number, is_scale, without_quantization
from lapis.weights.engine.outputs import Kernel, Output, unchanged
from lapis.weights.engine.sources import Stored, as_bytes
from lapis.weights.engine.tiles import Tile
from lapis.weights.matching import format_problems
from lapis.weights.merge.layout import widest
from lapis.weights.merge.mixture.recipe import Expert, MixtureRecipe

# model_type of the output -> of the models that it is made from, and its shared experts
_SOURCES = {
    "mixtral": (("llama", "mistral"), 0),
    "qwen3_moe": (("qwen3",), 0),
    "qwen2_moe": (("qwen2", "llama", "mistral"), 1),
}
_SPELLINGS = {"qwen": "qwen2_moe", "qwen moe": "qwen2_moe", "qwen3": "qwen3_moe", "qwen3 moe": "qwen3_moe"}
# what experts share with the base, and with each other, as config.json says it
_SAME = {"dim": "hidden_size", "layers": "num_hidden_layers", "mlp": "hidden_act", "ffn_dim": "intermediate_size"}


class InMemory:
    """A source that lies in memory: the gates of one layer. `values` [E, D] is there when they were made."""

    role = "gates"
    dtype = torch.float32

    def __init__(self, name: str, shape: tuple[int, ...], values: Tensor | None = None) -> None:
        self.name, self.shape, self.values = name, shape, values

    def read(self, first: int, last: int, into: memoryview) -> int:
        assert self.values is not None
        into[:] = as_bytes(self.values)[first * 4 : last * 4]
        return 0


@dataclass
class MixtureLayout:
    """What a mixture is made of. sources of gates are empty until `with_gates`."""

    family: Family
    shape: ModelConfig
    config: dict[str, Any]
    outputs: list[Output] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def with_gates(self, gates_LED: Tensor) -> list[Output]:
        """The outputs with their gates, those of the experts and that of the shared one."""
        count = self.shape.experts.count if self.shape.experts else 0
        result = []
        for output in self.outputs:
            if isinstance(output.sources[0], InMemory):
                match = self.family.match(output.name)
                assert match is not None and match[1] is not None
                of_layer = gates_LED[match[1]]
                rows = of_layer[:count] if match[0].component == "mlp.router" else of_layer[count:]
                output = replace(output, sources=(InMemory(output.name, output.shape, rows.float().contiguous()),))
            result.append(output)
        return result


def lay_out(recipe: MixtureRecipe, inputs: Mapping[str, Checkpoint]) -> MixtureLayout:
    """The output's tensors and config.json. Raises ConfigError where there is no such mixture."""
    base = inputs[recipe.base]
    kinds = {model: str(checkpoint.config.get("model_type")) for model, checkpoint in inputs.items()}
    kind = _output_kind(recipe, kinds)
    fields, notes = settled_tie(without_quantization(base.config), {recipe.base: base})
    shapes = {model: _shape(model, fields if model == recipe.base else inputs[model].config) for model in inputs}
    problems = [f"{model}: {line}" for model, checkpoint in inputs.items() for line in check_sizes(checkpoint)]
    problems += _differences(recipe, shapes)
    if problems:
        raise CheckpointError(format_problems("merge", problems))
    shared = sum(shapes[expert.model].ffn_dim for expert in recipe.shared)
    experts = Experts(len(recipe.experts), recipe.active, shared_dim=shared, balance=0.001)
    shape = replace(shapes[recipe.base], family=kind, ffn_dim=shapes[recipe.experts[0].model].ffn_dim, experts=experts)
    family = find({"model_type": kind})
    assert family is not None
    result = MixtureLayout(family, shape, family.write_config(shape), notes=notes)
    _Placing(recipe, inputs, result).place()
    if result.problems:
        raise CheckpointError(format_problems("merge", result.problems))
    dtype = str(result.outputs[0].dtype).removeprefix("torch.")
    result.config["torch_dtype"] = dtype
    result.notes += _kin(recipe, inputs)
    return result


def _output_kind(recipe: MixtureRecipe, kinds: Mapping[str, str]) -> str:
    named = recipe.architecture and recipe.architecture.lower()
    named = _SPELLINGS.get(named or "", named)
    if named is not None and named not in _SOURCES:
        raise ConfigError(f"merge: architecture is {quoted(recipe.architecture)}; there are {', '.join(_SOURCES)}")
    if len(set(kinds.values())) > 1:
        spelled = ", ".join(f"{kind} in {model}" for model, kind in kinds.items())
        raise ConfigError(f"merge: model_type is {spelled}; a mixture is made of models of one kind")
    kind, shared = kinds[recipe.base], len(recipe.shared)
    fitting = [name for name, (sources, count) in _SOURCES.items() if kind in sources and named in (None, name)]
    chosen = next((name for name in fitting if _SOURCES[name][1] == shared), None)
    if chosen:
        return chosen
    if fitting:
        count = _SOURCES[fitting[0]][1]
        raise ConfigError(
            f"merge: {shared} shared_experts, and {fitting[0]}, which {kind} models go into, has {count or 'none'}"
        )
    known = "; ".join(f"{name} of {' or '.join(sources)}" for name, (sources, _) in _SOURCES.items())
    raise ConfigError(f"merge: there is no mixture of {kind} models here{f' as {named}' if named else ''}; {known}")


def _shape(model: str, config: Mapping[str, Any]) -> ModelConfig:
    family = find(config)
    assert family is not None
    try:
        return family.read_config(config)
    except CheckpointError as error:
        raise CheckpointError(f"{model}: {error}") from None


def _differences(recipe: MixtureRecipe, shapes: Mapping[str, ModelConfig]) -> list[str]:
    """What an expert has otherwise than the base, or than the first expert."""
    result = []
    first = recipe.experts[0].model
    compared = [(model, recipe.base, name) for model in shapes for name in _SAME if name != "ffn_dim"]
    compared += [(expert.model, first, "ffn_dim") for expert in recipe.experts]
    for model, other, name in dict.fromkeys(compared):
        mine, theirs = getattr(shapes[model], name), getattr(shapes[other], name)
        if mine != theirs:
            result.append(f"{_SAME[name]} is {mine} in {model} and {theirs} in {other}; experts need equal shapes")
    return result


def _kin(recipe: MixtureRecipe, inputs: Mapping[str, Checkpoint]) -> list[str]:
    notes, base = [], inputs[recipe.base]
    models = list(dict.fromkeys(expert.model for expert in recipe.everyone))
    for model in models:
        cosine, _ = (None, 0) if inputs[model] is base else kinship(base, inputs[model])
        if cosine is not None and cosine < UNRELATED:
            notes.append(f"{recipe.base} and {model} are unrelated: the cosine of their weights is {cosine:.2f}")
    if len({expert.model for expert in recipe.experts}) == 1 and len(recipe.experts) > 1:
        notes.append(f"all experts are {models[0]}: the output says what one of them says, until it is trained")
    return notes


class _Placing:
    """Each tensor that a folder of the output holds with where it comes from."""

    def __init__(self, recipe: MixtureRecipe, inputs: Mapping[str, Checkpoint], into: MixtureLayout) -> None:
        self.recipe, self.inputs, self.into = recipe, inputs, into
        self.names = {
            model: {checkpoint.part(name): name for name in reversed(checkpoint.names)}
            for model, checkpoint in inputs.items()
        }
        self.taken: set[tuple[str, str]] = set()
        base = inputs[recipe.base]
        numbers = [Stored(recipe.base, base, name) for name in base.names if is_number(base, name)]
        self.dtype = getattr(torch, recipe.dtype) if recipe.dtype else widest(numbers)

    def place(self) -> None:
        required = self.into.family.required(self.into.shape)
        for name, shape in sorted(required.items(), key=lambda item: self._order(item[0])):
            self._put(name, shape)
        for model, checkpoint in self.inputs.items():
            self._rest(model, checkpoint)

    def _buffer(self, model: str, name: str) -> bool:
        checkpoint = self.inputs[model]
        ignored = checkpoint.family is not None and checkpoint.family.is_ignored(name)
        return ignored or is_scale(checkpoint, name)

    def _order(self, name: str) -> int:
        """Embeddings first, then layer by layer, as the inputs lie on the disk."""
        match = self.into.family.match(name)
        assert match is not None
        outside = -1 if match[0].component == "embed" else MOST_LAYERS
        return outside if match[1] is None else match[1]

    def _put(self, name: str, shape: tuple[int, ...]) -> None:
        match = self.into.family.match(name)
        assert match is not None
        rule, layer = match
        component = rule.component
        if component in ("mlp.router", "mlp.shared_gate"):
            self.into.outputs.append(Output(name, self.dtype, shape, (InMemory(name, shape),), Kernel(unchanged)))
            self.into.entries.append(Entry(name, "merged", f"gates: {self.recipe.gate_mode}"))
            return
        expert: Expert | None = None
        if rule.expert is not None:
            expert, component = self.recipe.experts[rule.expert], f"mlp.{component.rsplit('.', 1)[-1]}"
        elif component.startswith("mlp.shared."):
            expert, component = self.recipe.shared[0], component.replace("mlp.shared.", "mlp.")
        model = expert.model if expert else self.recipe.base
        own = self.names[model].get(Part(layer, component, rule.kind))
        if own is None:
            self.into.problems.append(f"{model} has no tensor for {name}")
            return
        self.taken.add((model, own))
        if not is_number(self.inputs[model], own):
            self.into.problems.append(
                f"{own} is {self.inputs[model].info(own).dtype} in {model}: numbers without a known scale; give the "
                "unquantized model"
            )
            return
        source = Stored(model, self.inputs[model], own)
        if source.shape != shape:
            spelled = "x".join(map(str, source.shape)), "x".join(map(str, shape))
            self.into.problems.append(f"{own} is {spelled[0]} in {model}; {name} is {spelled[1]}")
            return
        kernel = self._kernel(expert, name, component) or (None if source.dtype == self.dtype else Kernel(unchanged))
        self.into.outputs.append(Output(name, self.dtype, shape, (source,), kernel))
        self.into.entries.append(Entry(name, "merged" if expert else "copied", f"{own} of {model}"))

    def _kernel(self, expert: Expert | None, name: str, component: str) -> Kernel | None:
        """What an expert's noise and scale do to a tensor; None where nothing."""
        scale = expert.residual if expert and component == "mlp.down" else 1.0
        noise = expert.noise if expert else 0.0
        if scale == 1.0 and not noise:
            return None
        key = hashlib.sha256(f"{self.recipe.seed}\0{name}".encode()).digest()

        def apply(tile: Tile, _state: Any) -> tuple[Tensor, None]:
            values = tile.inputs[0]
            if noise:  # the whole tensor is one tile, so that its noise is the same wherever it is drawn
                random = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
                values = values + torch.randn(values.shape, generator=random) * noise
            return values * scale, None

        return Kernel(apply, whole=bool(noise))

    def _rest(self, model: str, checkpoint: Checkpoint) -> None:
        """Tensors that are not taken: a reason each, or a problem where the output has no place for one of the base."""
        for name in checkpoint.names:
            if (model, name) in self.taken:
                continue
            part = checkpoint.part(name)
            if self._buffer(model, name):
                why = "a buffer, or the scales of a weight that is written without"
            elif model != self.recipe.base:
                why = "an expert gives its MLPs only"
            elif part.component.startswith("mlp."):
                why = "the experts take the place of the base's MLPs"
            elif part.component == "head":
                why = "the output's head is tied to its embedding"
            else:
                self.into.problems.append(f"{name} of {model} has no place in a {self.into.shape.family} folder")
                continue
            self.into.entries.append(Entry(name, "skipped", why, role=model))
