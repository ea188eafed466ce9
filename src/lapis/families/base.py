"""What a family is: a table from the names on disk to names here and to parts, and all else that is its own.

Loading, saving, counting, LoRA targets, diff tables, merge filters, freeze lists and lens labels all read the one
table. The tables themselves are one file for each family.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

from lapis.errors import CheckpointError, ConfigError
from lapis.families.config import ModelConfig
from lapis.families.fields import Fields
from lapis.families.gguf import Gguf
from lapis.families.shapes import SAME, Shape, Transform, common_shapes, has_parameter
from lapis.parsing import quoted

# names of the language model in a multimodal folder, old and new, become those of a folder of its own
WRAPPED = ((r"^(?:model\.)?language_model\.(?:model\.)?", ""),)
EXPERT = "{expert}"
_EXPERT = re.compile(r"\.experts\.(\d+|\{expert\})\.")


@dataclass(frozen=True)
class Part:
    """Where a tensor belongs.

    layer: 0-based block, None outside the blocks. component: "embed", "attn.q", "mlp.down", "mlp.experts.5.down",
    "norm.attn", "head", ... kind: "weight" or "bias".
    """

    layer: int | None
    component: str
    kind: str

    @property
    def group(self) -> str:
        """The component without the number of an expert: what it has in common with those of all others."""
        return _EXPERT.sub(".experts.", self.component)


@dataclass(frozen=True)
class Rule:
    """One line of a family's table.

    Attributes:
        disk: The name in the file without the family's prefix, with `{layer}` for the number of the block, and
            `{expert}` for that of an expert in it.
        names: The parameters here that the tensor fills, in order; several where the disk holds them fused.
        component: For Part.
        transform: How the tensor on disk becomes the parameters, and back.
        outside: The family's prefix never stands before this name (heads).
        twin: A second spelling of a parameter that another rule lists. Where a file has both, this one counts.
        expert: Of which expert it is, where it stands for one (`of_expert`).
    """

    disk: str
    names: tuple[str, ...]
    component: str
    transform: Transform = SAME
    outside: bool = False
    twin: bool = False
    expert: int | None = None

    @property
    def kind(self) -> str:
        return "bias" if self.disk.endswith("bias") else "weight"

    def for_heads(self, heads: int, key_heads: int = 0) -> "Rule":
        """The same, with the transform for a number of heads where it wants that."""
        if self.transform.by_key_head is not None and key_heads:
            return replace(self, transform=self.transform.by_key_head(key_heads))
        make = self.transform.by_head
        return self if make is None else replace(self, transform=make(heads))

    def of_all(self, experts: int) -> "Rule":
        """The rule of a tensor that stacks what each expert has, for a number of them; itself where it is no such."""
        if EXPERT in self.disk or not any(EXPERT in name for name in self.names):
            return self
        return replace(self, names=tuple(n.replace(EXPERT, str(e)) for e in range(experts) for n in self.names))

    def of_expert(self, expert: int | None) -> "Rule":
        """The rule of one expert; itself where it is not about experts."""
        if expert is None or EXPERT not in self.disk:
            return self
        disk, component, *names = (
            text.replace(EXPERT, str(expert)) for text in (self.disk, self.component, *self.names)
        )
        return replace(self, disk=disk, component=component, names=tuple(names), expert=expert)


def rules(stem: str, component: str, kinds: str = "weight", transform: Transform = SAME, *, outside: bool = False,
          twin: bool = False) -> tuple[Rule, ...]:  # fmt: skip
    """The rules for one module: `stem.weight` and, with kinds="weight bias", `stem.bias`.

    The name here is the component itself, in its block where the stem has a `{layer}`.
    """
    lead = "blocks.{layer}." if "{layer}" in stem else ""
    return tuple(
        Rule(f"{stem}.{kind}", (f"{lead}{component}.{kind}",), component,
             transform if kind == "weight" else SAME, outside, twin)
        for kind in kinds.split()
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One architecture: how it looks on disk, and what differs in it.

    Attributes:
        name: Of the family; messages use it.
        model_types: The values of config.json's `model_type` that are this family.
        rules: The table of names on disk.
        reader: config.json -> the fields of ModelConfig. `rope`, `window_rope` and `image` may be mappings.
        writer: ModelConfig -> config.json.
        prefix: What models with a head put before the names ("model."). Bare models and many files of the hub leave it
            out; both are read.
        ignored: Patterns of tensors that are known and not used (masks, buffers).
        spellings: Patterns of older names, and what they became.
        shapes: Shapes of parameters that no other family has, by component.
        defaults: model_type -> the fields of ModelConfig that a new model of this kind has, so that a user gives sizes
            only.
        presets: Published sizes: name -> the fields of config.json that shape the model.
        block: A module of `lapis.model.blocks`, whose `ARCHITECTURE` builds the model; its own where the block differs.
        gguf: model_type -> how such a model lies in a GGUF file, where llama.cpp has it.
        wrappers: The values of `model_type` of multimodal folders whose language model is run as one of this family,
            by its own part of config.json; text alone goes through it as through a folder of its own.
        modules: Patterns of names that folders have, and what transformers, and so PEFT, calls these modules; names
            of adapters follow the latter.
    """

    name: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    reader: Callable[[Fields], dict[str, Any]]
    writer: Callable[[ModelConfig], dict[str, Any]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    shapes: Callable[[ModelConfig], dict[str, Shape]] = lambda config: {}
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    block: str = "standard"
    gguf: Mapping[str, Gguf] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()

    def for_heads(self, heads: int, key_heads: int = 0) -> "Family":
        """The same, with the numbers of heads in the transforms that want them. Itself where none does.

        Args:
            heads: Of queries.
            key_heads: Of a delta net's keys; 0 = there is none.
        """
        if all(rule.transform.by_head is None and rule.transform.by_key_head is None for rule in self.rules):
            return self
        key = heads, key_heads
        if key not in self._for_heads:
            self._for_heads[key] = replace(self, rules=tuple(rule.for_heads(*key) for rule in self.rules))
        return self._for_heads[key]

    @cached_property
    def _for_heads(self) -> "dict[tuple[int, int], Family]":
        return {}

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], Rule], ...]:
        lead = f"(?:{re.escape(self.prefix)})?"
        return tuple(
            (
                re.compile(
                    lead
                    + re.escape(rule.disk)
                    .replace(r"\{layer\}", r"(?P<layer>0|[1-9]\d{0,8})")
                    .replace(r"\{expert\}", r"(?P<expert>0|[1-9]\d{0,8})")
                ),
                rule,
            )
            for rule in self.rules
        )

    @cached_property
    def _by_name(self) -> dict[str, Rule]:
        return {name: rule for rule in self.rules if not rule.twin for name in rule.names}

    def match(self, disk_name: str) -> tuple[Rule, int | None] | None:
        """The rule that a name on disk falls under, with its layer; None where the table does not list it."""
        for old, new in self.spellings:
            disk_name = re.sub(old, new, disk_name)
        for pattern, rule in self._patterns:
            if match := pattern.fullmatch(disk_name):
                layer, expert = (match.groupdict().get(name) for name in ("layer", "expert"))
                rule = rule if expert is None else rule.of_expert(int(expert))
                return rule, None if layer is None else int(layer)
        return None

    def is_ignored(self, disk_name: str) -> bool:
        return any(re.search(pattern, disk_name) for pattern in self.ignored)

    def part(self, disk_name: str) -> Part | None:
        """Where a tensor on disk belongs; None where the table does not list it."""
        match = self.match(disk_name)
        return Part(match[1], match[0].component, match[0].kind) if match else None

    def rule_for(self, name: str) -> tuple[Rule, int | None]:
        """The rule that fills the parameter `name` of a model here ("blocks.3.attn.q.weight"), with its layer."""
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        key = f"blocks.{{layer}}.{match[2]}" if match else name
        numbered = _EXPERT.search(key)
        if key not in self._by_name and numbered:
            rule = self._by_name[_EXPERT.sub(f".experts.{EXPERT}.", key)]
            return rule.of_expert(int(numbered[1])), int(match[1]) if match else None
        return self._by_name[key], int(match[1]) if match else None

    def disk_name(self, rule: Rule, layer: int | None, *, bare: bool = False) -> str:
        """The name on disk as transformers writes it; bare: for a model that has no head."""
        lead = "" if bare or rule.outside else self.prefix
        return lead + rule.disk.replace("{layer}", str(layer))

    def canonical(self, disk_name: str) -> str | None:
        """The name as transformers writes it for a model with a head; None where the table does not list it."""
        match = self.match(disk_name)
        return self.disk_name(*match) if match else None

    def stacked(self, disk_name: str) -> str | None:
        """The tensor that may stand in a folder for this one and those of all other experts; None where none may."""
        match = self.match(disk_name)
        if match is None or match[0].expert is None:
            return None
        generic = _EXPERT.sub(f".experts.{EXPERT}.", match[0].names[0])
        other = next((rule for rule in self.rules if generic in rule.names and EXPERT not in rule.disk), None)
        return self.disk_name(other, match[1]) if other else None

    def rules_of(self, config: ModelConfig) -> Iterator[Rule]:
        """The table for a model of this shape: a line of experts becomes one for each of them."""
        for rule in self.rules:
            if EXPERT not in rule.disk:
                yield rule
            elif config.experts is not None:
                yield from (rule.of_expert(expert) for expert in range(config.experts.count))

    def parameter_shapes(self, config: ModelConfig) -> dict[str, Shape]:
        """Every parameter's name and shape, of the blocks the first of each kind: what `Transformer` would make."""
        norm, firsts = (config.dim,), sorted(set(config.kinds))
        sizes = {layer: common_shapes(own) | self.shapes(own)
                 for layer, own in [(None, config), *((layer, config.at(layer)) for layer in firsts)]}  # fmt: skip
        return {
            name.replace("{layer}", str(layer)): shape
            for rule in self.rules_of(config) if not rule.twin
            for name, part in ((name, part_of(name)) for name in rule.names)
            for layer in (firsts if "{layer}" in name else (None,))
            if has_parameter(config, part.component, part.kind, layer)
            for whole in (sizes[layer].get(part.group, norm),)
            for shape in (whole if rule.kind == "weight" else sizes[layer].get(f"{part.group}.bias", whole[:1]),)
        }  # fmt: skip

    def required(self, config: ModelConfig) -> dict[str, Shape]:
        """The tensors that a folder of this shape must hold: canonical name -> shape on disk, for every layer.

        A pooler under a bare model is left out; a folder may or may not have it.
        """
        shapes = self.parameter_shapes(config)
        tensors: dict[str, Shape] = {}
        for rule in self.rules_of(config):
            if rule.twin or (rule.component == "head.pooler" and config.head == "none"):
                continue
            for layer, first in enumerate(config.kinds) if "{layer}" in rule.disk else ((None, None),):
                names = [name.replace("{layer}", str(first)) for name in rule.names]
                if names[0] in shapes:
                    tensors[self.disk_name(rule, layer)] = rule.transform.disk_shape([shapes[name] for name in names])
        return tensors

    def read_config(self, config: Mapping[str, Any], notes: list[str] | None = None) -> ModelConfig:
        """The shape that a config.json gives. Only fields of the allow-list are read; `notes` names the others.

        Raises:
            CheckpointError: A field is missing, of a wrong type or out of range.
        """
        fields = Fields(config)
        try:
            shape = ModelConfig.of({**self.reader(fields), "extra": fields.extra})
            if "layer_types" not in fields.known:  # of a family whose layers are all of one kind
                fields.layer_types(shape.layers, ("full_attention",))
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        if notes is not None:
            fields.known.add("quantization_config")  # of the tensors: model/check.py says what becomes of it
            notes.extend(fields.notes())
        return shape

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """A config.json that transformers >= 4.51 and 5 read. Raises ConfigError where none fits."""
        return self.writer(config)


def refuse_shape(config: ModelConfig, fields: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ConfigError where a field has a value that a family's folder cannot say.

    Args:
        config: Of the model.
        fields: Name -> what it can be; `rope.share` is a field of the rotary positions.
    """
    plain = {
        "query_scalar": (0, config.head_dim), "window_rope": (None,), "nope_layers": ((),), "qk_norm_over": ("head",),
        "embed_scale": (0.0,), "residual_scale": (1.0,), "logit_divisor": (1.0,), "norm_bias": (True,),
        "parallel": ("none",), "attention_cap": (0.0,), "logit_cap": (0.0,), "rope.share": (1.0,),
        "rope.neighbors": (False,), "first_position": (0,), "class_dense": ("none",),
        "experts": (None,), "delta": (None,), "uneven": (None,), "layer_inputs": (None,), "pooling": ("token",),
    }  # fmt: skip
    for name, allowed in (plain | dict(fields)).items():
        if (value := attrgetter(name)(config)) not in allowed:
            known = " or ".join(map(str, allowed))
            raise ConfigError(f"{name}={quoted(value)} has no place in a {config.family} folder; it can be {known}")


_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)")


def part_of(name: str) -> Part:
    """The part that a parameter of a model here belongs to; its name is its component: `blocks.3.attn.q.weight`."""
    match = re.fullmatch(r"(?:blocks\.(\d+|\{layer\})\.)?(.+?)(?:\.(weight|bias))?", name)
    assert match
    layer = int(match[1]) if match[1] and match[1].isdigit() else None
    return Part(layer, match[2], match[3] or "weight")


def fallback_part(disk_name: str) -> Part:
    """A part for a family that is not known: the layer's number and the rest of the name, read from the name itself."""
    stem, _, last = disk_name.rpartition(".")
    kind = "bias" if last in ("bias", "beta") else "weight"
    base = stem if last in ("weight", "bias", "gamma", "beta") and stem else disk_name
    match = _LAYER.search(base)
    if match:
        return Part(int(match[1]), match[2], kind)
    if re.search(r"(embed_tokens|embed_in|wte|word_embeddings|tok_embeddings|(^|\.)embeddings)$", base):
        return Part(None, "embed", kind)
    if base.endswith(("lm_head", "embed_out")):
        return Part(None, "head", kind)
    return Part(None, base, kind)


def experts_of(rules: Iterable[Rule]) -> int:
    """How many experts a block has by the rules that its tensors fall under: the highest number plus one."""
    return max((rule.expert + 1 for rule in rules if rule.expert is not None), default=0)


def layers_of(names: Iterable[str], family: Family) -> int:
    """How many blocks the names on disk have: the highest number plus one."""
    return max((match[1] + 1 for name in names if (match := family.match(name)) and match[1] is not None), default=0)
