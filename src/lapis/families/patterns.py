"""Patterns: text that chooses parts of a model: what LoRA adapts, what a run tunes or freezes, what a graft scales.

attn.q            a component, in every layer; "attn" and "mlp" stand for all that is below them
mlp.experts.gate  a component of all experts; mlp.experts.5 is all of one
layers.0-5        all of some layers (a number, or a range with both ends in it); "0-5" is the same
layers.3.attn.q   a component of some layers; "3.attn.q" is the same
embed, norm, head what lies outside the layers as well
all               everything

Where no component is called so, the name of a module on disk is understood too: q_proj, self_attn, layers.0-5.c_fc.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lapis.errors import ConfigError
from lapis.families.base import Family, Part
from lapis.parsing import quoted

_SHAPE = re.compile(r"(?:(?:layers?|blocks)\.)?(\d{1,6}(?:-\d{1,6})?)(?:\.([A-Za-z_][\w.]*))?")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_MOST_LAYERS = 100_000
_FUSED = {"attn.qkv": ("attn.qkv", "attn.q", "attn.k", "attn.v")}  # one tensor on disk, three parameters here


@dataclass(frozen=True)
class Pattern:
    """Which parts are chosen.

    Attributes:
        layers: Their numbers; None for all layers and what lies outside them.
        components: Names, each with all that is below it; None for all.
    """

    layers: tuple[int, ...] | None = None
    components: tuple[str, ...] | None = None

    def covers(self, part: Part) -> bool:
        """Whether a part is chosen."""
        if self.layers is not None and part.layer not in self.layers:
            return False
        return self.components is None or any(
            own == name or own.startswith(f"{name}.")
            for text in self.components
            for name in _FUSED.get(text, (text,))
            for own in (part.component, part.group)
        )

    def resolved(self, parts: Iterable[Part], family: Family | None) -> "Pattern":
        """The same with the components that names on disk stand for, where no part is called by these names."""
        parts = list(parts)
        texts = self.components or ()
        if family is None or all(any(Pattern(None, (text,)).covers(part) for part in parts) for text in texts):
            return self
        if len(texts) == 1 and (match := family.match(f"{texts[0]}.weight") or family.match(texts[0])) is not None:
            layers = self.layers if match[1] is None else (match[1],)
            return Pattern(layers, (match[0].component,))
        components = [component for text in texts for component in _components(text, family) or (text,)]
        return replace(self, components=tuple(dict.fromkeys(components)))

    def __str__(self) -> str:
        pieces = [] if self.layers is None else [f"layers.{spell_layers(self.layers)}"]
        return ".".join([*pieces, *([] if self.components is None else ["|".join(self.components)])]) or "all"

    def problem(self, parts: Sequence[Part], text: str = "") -> str:
        """What is wrong where no part is chosen, with the nearest that there is; "" where one is. text: as typed."""
        if any(self.covers(part) for part in parts):
            return ""
        names = sorted({part.component for part in parts})
        known = sorted({*names, *(name.rpartition(".")[0] for name in names)} - {""})
        unknown = [text for text in self.components or () if not any(Pattern(None, (text,)).covers(p) for p in parts)]
        if not unknown:
            layers = sorted({part.layer for part in parts if part.layer is not None})
            nearest = f"the layers are {spell_layers(layers)}" if layers else f"known: {', '.join(known)}"
        else:
            close = difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.4)
            nearest = f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}"
        return f'"{text or self}" matches nothing; {nearest}'


def read_pattern(text: str, where: str) -> Pattern:
    """A pattern from its text.

    Raises:
        ConfigError: For text that is none; `where` says which setting.
    """
    match = _SHAPE.fullmatch(text)
    if text in ("all", "*"):
        return Pattern()
    if match:
        return Pattern(read_layers(match[1], where), None if match[2] is None else (match[2],))
    if _NAME.fullmatch(text):
        return Pattern(None, (text,))
    raise ConfigError(f'{where}: "{text}" is no pattern such as attn.q, layers.0-5 or layers.3.mlp')


def read_layers(value: Any, where: str) -> tuple[int, ...]:
    """Numbers of layers from a number, from text such as `0-5,8`, or from a list of these.

    Raises:
        ConfigError: For what is none; `where` says which setting.
    """
    layers: list[int] = []
    for item in value if isinstance(value, list) else str(value).split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", str(item))
        if not match or int(match[2] or match[1]) - int(match[1]) not in range(_MOST_LAYERS):
            raise ConfigError(f"{where}: {quoted(item)} is not a layer or a range such as 0-7")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
        if len(layers) > _MOST_LAYERS:
            raise ConfigError(f"{where}: names more than {_MOST_LAYERS:,} layers")
    return tuple(layers)


def covered_parts(texts: Iterable[str], parts: Iterable[Part], where: str, family: Family | None = None) -> set[Part]:
    """The parts that at least one pattern covers.

    Args:
        texts: Patterns.
        parts: Of a model.
        where: Which setting.
        family: Whose names on disk are understood.

    Raises:
        ConfigError: For text that is no pattern, and for a pattern that covers no part, with the nearest names that
            there are.
    """
    parts = list(parts)
    patterns = {text: read_pattern(text, where).resolved(parts, family) for text in texts}
    for text, pattern in patterns.items():
        if problem := pattern.problem(parts, text):
            raise ConfigError(f"{where}: {problem}")
    return {part for part in parts if any(pattern.covers(part) for pattern in patterns.values())}


def _components(name: str, family: Family) -> list[str]:
    """The components of what is called `name` on disk, ends with it, or has it as a part in between."""
    return list(dict.fromkeys(
        Part(None, rule.component, rule.kind).group for rule in family.rules
        if f".{name}." in f".{rule.disk.removesuffix('.weight').removesuffix('.bias')}."
    ))  # fmt: skip


def spell_layers(layers: Iterable[int]) -> str:
    """Layers as text: `3`, `0-7`, or `0, 2, 5`."""
    listed = list(layers)
    if listed and listed == list(range(listed[0], listed[-1] + 1)):
        return str(listed[0]) if len(listed) == 1 else f"{listed[0]}-{listed[-1]}"
    return ", ".join(map(str, listed)) or "none"
