"""Parts of a model named by patterns: what LoRA adapts, what a run tunes or freezes.

    attn.q            a component, in every layer; "attn" and "mlp" stand for all that is below them
    layers.0-5        all of some layers (a number, or a range with both ends in it)
    layers.3.attn.q   a component of some layers
    embed, norm, head what lies outside the layers as well
    all               everything

Leaves out: numbers for each part (weights/graft/scale.py).
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lapis.errors import ConfigError
from lapis.families.base import Part

_SHAPE = re.compile(r"(?:(?:layers?|blocks)\.)?(\d{1,6})(?:-(\d{1,6}))?(?:\.([a-z][\w.]*))?")
_FUSED = {"attn.qkv": ("attn.q", "attn.k", "attn.v")}


@dataclass(frozen=True)
class Pattern:
    """One pattern. layers: first and last, or None for all (and what lies outside). components: None for all."""

    text: str
    layers: tuple[int, int] | None
    components: tuple[str, ...] | None

    def covers(self, part: Part) -> bool:
        if self.layers is not None and (part.layer is None or not self.layers[0] <= part.layer <= self.layers[1]):
            return False
        return self.components is None or any(
            part.component == name or part.component.startswith(f"{name}.") for name in self.components
        )


def read_patterns(texts: Iterable[str], where: str) -> tuple[Pattern, ...]:
    """Patterns from their text. Raises ConfigError for text that is none."""
    found = []
    for text in texts:
        shape = _SHAPE.fullmatch(text)
        if text in ("all", "*"):
            found.append(Pattern(text, None, None))
        elif shape and int(shape[2] or shape[1]) >= int(shape[1]):
            layers = int(shape[1]), int(shape[2] or shape[1])
            found.append(Pattern(text, layers, _components(shape[3])))
        elif re.fullmatch(r"[a-z][a-z0-9_.]*", text):
            found.append(Pattern(text, None, _components(text)))
        else:
            raise ConfigError(f'{where}: "{text}" is no pattern such as attn.q, layers.0-5 or layers.3.mlp')
    return tuple(found)


def chosen(patterns: Sequence[Pattern], parts: Iterable[Part], where: str) -> set[Part]:
    """The parts that at least one pattern covers.

    Raises ConfigError for a pattern that covers none, with the nearest names that there are.
    """
    parts = list(parts)
    for pattern in patterns:
        if not any(pattern.covers(part) for part in parts):
            raise ConfigError(f'{where}: "{pattern.text}" matches nothing; {_there(pattern, parts)}')
    return {part for part in parts if any(pattern.covers(part) for pattern in patterns)}


def _components(name: str | None) -> tuple[str, ...] | None:
    return None if name is None else _FUSED.get(name, (name,))


def _there(pattern: Pattern, parts: list[Part]) -> str:
    """What a pattern might have meant."""
    names = sorted({part.component for part in parts})
    known = sorted({*names, *(name.rpartition(".")[0] for name in names)} - {""})
    if pattern.components is None or any(name == c or name.startswith(f"{c}.") for name in names
                                         for c in pattern.components):  # fmt: skip
        layers = sorted({part.layer for part in parts if part.layer is not None})
        return f"the layers are {layers[0]}-{layers[-1]}" if layers else f"known: {', '.join(known)}"
    close = difflib.get_close_matches(pattern.components[0], known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}"
