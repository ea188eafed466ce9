"""What a family is: a table from the names on disk to names here and to parts. Tables, no tensors.

Loading, saving, LoRA targets, diff tables, merge filters, freeze lists and lens labels all read the one table.
Leaves out: the tables themselves (one file per family) and anything that touches a weight.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lapis.errors import ConfigError
from lapis.families.fields import Fields


@dataclass(frozen=True)
class Part:
    """Where a tensor belongs.

    layer: 0-based block, None outside the blocks. component: "embed", "attn.q", "mlp.down", "norm.attn", "head", ...
    kind: "weight" or "bias".
    """

    layer: int | None
    component: str
    kind: str


@dataclass(frozen=True)
class Rule:
    """One line of a family's table.

    disk: the name in the file without the family's prefix, `{layer}` for the block's number. names: the parameters here
    that it fills, in order; more than one where the disk holds them fused. component: for Part. transform: how the
    tensor on disk becomes them (and back); a name that model/load.py knows. outside: the family's prefix is never
    written before it (heads). twin: a second spelling of a parameter that another rule lists; where both are there,
    it is the one that counts.
    """

    disk: str
    names: tuple[str, ...]
    component: str
    transform: str = "same"
    outside: bool = False
    twin: bool = False

    @property
    def kind(self) -> str:
        return "bias" if self.disk.endswith("bias") else "weight"


def rules(stem: str, component: str, kinds: str = "weight", transform: str = "same", *, outside: bool = False,
          twin: bool = False) -> tuple[Rule, ...]:  # fmt: skip
    """The rules for one module: `stem.weight` and, with kinds="weight bias", `stem.bias`.

    The name here is the component itself, in its block where the stem has a `{layer}`.
    """
    lead = "blocks.{layer}." if "{layer}" in stem else ""
    return tuple(
        Rule(f"{stem}.{kind}", (f"{lead}{component}.{kind}",), component,
             transform if kind == "weight" else "same", outside, twin)
        for kind in kinds.split()
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How one architecture looks on disk.

    prefix: what models with a head put before the names ("model."); bare models and many hub files leave it out, and
    both are read. ignored: patterns of tensors that are known and not used (masks, buffers). spellings: patterns of
    older names and what they became. reader: config.json -> ModelConfig's fields. writer: the reverse.
    """

    name: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    reader: Callable[[Fields], dict[str, Any]]
    writer: Callable[[Any], dict[str, Any]]
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], Rule], ...]:
        lead = f"(?:{re.escape(self.prefix)})?"
        return tuple(
            (re.compile(lead + re.escape(rule.disk).replace(r"\{layer\}", r"(?P<layer>0|[1-9]\d{0,8})")), rule)
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
            if found := pattern.fullmatch(disk_name):
                layer = found.groupdict().get("layer")
                return rule, None if layer is None else int(layer)
        return None

    def is_ignored(self, disk_name: str) -> bool:
        return any(re.search(pattern, disk_name) for pattern in self.ignored)

    def part(self, disk_name: str) -> Part | None:
        """Where a tensor on disk belongs; None where the table does not list it."""
        found = self.match(disk_name)
        return Part(found[1], found[0].component, found[0].kind) if found else None

    def rule_for(self, name: str) -> tuple[Rule, int | None]:
        """The rule that fills the parameter `name` of a model here ("blocks.3.attn.q.weight"), with its layer."""
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        key = f"blocks.{{layer}}.{found[2]}" if found else name
        return self._by_name[key], int(found[1]) if found else None

    def disk_name(self, rule: Rule, layer: int | None, *, bare: bool = False) -> str:
        """The name on disk as transformers writes it; bare: for a model that has no head."""
        lead = "" if bare or rule.outside else self.prefix
        return lead + rule.disk.replace("{layer}", str(layer))

    def read_config(self, config: Mapping[str, Any], notes: list[str] | None = None) -> dict[str, Any]:
        """ModelConfig's fields from a config.json. Only fields of the allow-list are read; the others go to `notes`.

        Raises CheckpointError for a field that is missing, of the wrong type or out of range.
        """
        fields = Fields(config)
        result = self.reader(fields)
        result["extra"] = fields.kept
        if notes is not None:
            notes.extend(fields.notes())
        return result

    def write_config(self, config: Any) -> dict[str, Any]:
        """A config.json that transformers >= 4.51 and 5 read, from a ModelConfig. ConfigError where none fits."""
        return self.writer(config)


def refuse_shape(config: Any, wanted: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises ConfigError where a ModelConfig's field has a value that a family's folder cannot say."""
    for name, allowed in wanted.items():
        if getattr(config, name) not in allowed:
            known = " or ".join(map(str, allowed))
            raise ConfigError(
                f"{name}={getattr(config, name)!r} has no place in a {config.family} folder; it can be {known}"
            )


_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)")


def part_of(name: str) -> Part:
    """The part that a parameter of a model here belongs to; its name is its component: `blocks.3.attn.q.weight`."""
    found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(?:\.(weight|bias))?", name)
    assert found
    return Part(None if found[1] is None else int(found[1]), found[2], found[3] or "weight")


def fallback_part(disk_name: str) -> Part:
    """A part for a family that is not known: the layer's number and the rest of the name, read from the name itself."""
    stem, _, last = disk_name.rpartition(".")
    kind = "bias" if last in ("bias", "beta") else "weight"
    base = stem if last in ("weight", "bias", "gamma", "beta") and stem else disk_name
    found = _LAYER.search(base)
    if found:
        return Part(int(found[1]), found[2], kind)
    if re.search(r"(embed_tokens|wte|word_embeddings)$", base):
        return Part(None, "embed", kind)
    if base.endswith("lm_head"):
        return Part(None, "head", kind)
    return Part(None, base, kind)


def layers_of(names: Iterable[str], family: Family) -> int:
    """How many blocks the names on disk speak of: the highest number plus one."""
    return max((found[1] + 1 for name in names if (found := family.match(name)) and found[1] is not None), default=0)
