"""What a family is: a table from the names on disk to names here and to parts. Tables, no tensors.

Loading, saving, LoRA targets, diff tables, merge filters, freeze lists and lens labels all read the one table.
Leaves out: the tables themselves (one file per family) and anything that touches a weight.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


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

    disk: the name in the file, `{layer}` for the block's number. names: the parameters here that it fills, in order;
    more than one where the disk holds them fused. transform: how to turn the disk tensor into them (and back);
    "same", "transpose" (GPT-2's Conv1D), or a name that model/load.py knows. optional: absent in some variants.
    """

    disk: str
    names: tuple[str, ...]
    component: str
    transform: str = "same"
    optional: bool = False

    @property
    def kind(self) -> str:
        return "bias" if self.disk.endswith(("bias", "beta")) else "weight"


@dataclass(frozen=True)
class Family:
    """How one architecture looks on disk.

    prefixes: what hubs put before, or leave out of, the names ("model.", "transformer.", "bert."). ignored: patterns of
    tensors that are known and not used (masks, buffers). read_config: config.json -> ModelConfig's fields.
    write_config: the reverse, complete enough for transformers.
    """

    name: str
    model_types: tuple[str, ...]
    rules: tuple[Rule, ...]
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = field(default=("",))

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], Rule], ...]:
        lead = "(?:" + "|".join(re.escape(p) for p in sorted(self.prefixes, key=len, reverse=True)) + ")"
        return tuple(
            (re.compile(lead + re.escape(rule.disk).replace(r"\{layer\}", r"(?P<layer>\d+)")), rule)
            for rule in self.rules
        )

    def match(self, disk_name: str) -> tuple[Rule, int | None] | None:
        """The rule that a name on disk falls under, with its layer; None where the table does not list it."""
        for pattern, rule in self._patterns:
            if found := pattern.fullmatch(disk_name):
                layer = found.groupdict().get("layer")
                return rule, None if layer is None else int(layer)
        return None

    def is_ignored(self, disk_name: str) -> bool:
        return any(re.search(pattern, disk_name) for pattern in self.ignored)

    def part(self, disk_name: str) -> Part | None:
        found = self.match(disk_name)
        return Part(found[1], found[0].component, found[0].kind) if found else None


_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block)\.(\d+)\.(.+)")


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
