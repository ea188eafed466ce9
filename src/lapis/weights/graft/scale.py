"""How strongly each part of a model is changed: one number, or a number for each of several patterns.

Written as `1.0`, as `0-7=0.5,8-23=1.0`, as `attn=1,mlp=0.5,12-23.mlp=0`, or in a YAML file (what `lapis plan` writes):

    default: 0.0                 # where no line below applies; 1.0 if left out
    scales:
      - {layers: 12-23, components: [attn.q, attn.k], scale: 1.0}
      - {layer: 3, scale: 0.5}

Later lines win over earlier ones. Patterns are those of families/patterns.py.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lapis.config import check_number, load_yaml, nearest
from lapis.errors import ConfigError
from lapis.families.base import Family, Part
from lapis.families.patterns import Pattern, read_layers, read_pattern
from lapis.families.plan_file import shape_problem
from lapis.parsing import quoted


@dataclass(frozen=True)
class Scale:
    """A scale for every part of a model.

    Attributes:
        default: Where no rule applies.
        rules: Patterns with their numbers; the last that covers a part counts.
        shape: Of the model that a plan was made for.
        embeddings: Whether a graft is to add to these ("add", "keep"), where a plan says so.
    """

    default: float = 1.0
    rules: tuple[tuple[Pattern, float], ...] = ()
    shape: Mapping[str, Any] = field(default_factory=dict, compare=False)
    embeddings: str | None = None

    def of(self, part: Part) -> float:
        """The number for one part."""
        return next((scale for pattern, scale in reversed(self.rules) if pattern.covers(part)), self.default)

    def resolved(self, parts: Iterable[Part], family: Family | None) -> "Scale":
        """The same by the names of components, where modules were named as they are on disk."""
        parts = list(parts)
        return replace(self, rules=tuple((pattern.resolved(parts, family), scale) for pattern, scale in self.rules))

    def to_json(self) -> Any:
        """A number where one number is all there is, else the mapping that the YAML file would hold."""
        if not self.rules:
            return self.default
        lines = []
        for pattern, scale in self.rules:
            line: dict[str, Any] = {"scale": scale}
            if pattern.layers is not None:
                line["layers"] = list(pattern.layers)
            if pattern.components is not None:
                line["components"] = list(pattern.components)
            lines.append(line)
        return {"default": self.default, "scales": lines}

    def problems(self, parts: Iterable[Part], shape: Mapping[str, Any] | None = None) -> list[str]:
        """Rules that apply to no part, a line each; or that the plan was made for a model of another shape.

        Args:
            parts: Of the model that is changed.
            shape: Its dim, layers and so on, where its family is known.
        """
        if shape and (problem := shape_problem(self.shape, shape)):
            return [f"scale: the plan was made for another model ({problem}); plan for this one"]
        listed = list(parts)
        return [f"scale: {problem}" for pattern, _ in self.rules if (problem := pattern.problem(listed))]


def read_scale(value: "float | str | Path | Mapping[str, Any] | Scale", where: str = "scale") -> Scale:
    """A Scale from what a user gives: a number, text as above, a mapping, or the path of a YAML file.

    Raises:
        ConfigError: For what is none of these.
    """
    if isinstance(value, Scale):
        return value
    if isinstance(value, Mapping):
        return _from_mapping(value, where)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Scale(_number(value, where))
    text = str(value).strip()
    if text.endswith((".yaml", ".yml")) or os.path.isfile(text):
        settings = load_yaml(text)
        return _from_mapping(settings.get("plan", settings), text)
    if "=" not in text:
        return Scale(_number(text, where))
    default, rules = 1.0, []
    for piece in text.split(","):
        what, _, number = piece.partition("=")
        scale = _number(number, f'{where}: "{piece}"')
        if what.strip() in ("default", "*"):
            default = scale
        else:
            rules.append((read_pattern(what.strip(), f'{where}: "{piece}"'), scale))
    return Scale(default, tuple(rules))


def _from_mapping(settings: Mapping[str, Any], where: str) -> Scale:
    rules = []
    lines = settings.get("scales", [])
    if not isinstance(lines, list) or "scales" not in settings:
        raise ConfigError(f'{where}: expected "scales:", a list of {{layers, components, scale}}')
    known = ("layer", "layers", "component", "components", "scale")
    for i, line in enumerate(lines):
        place = f"{where}: scales[{i}]"
        if not isinstance(line, Mapping) or "scale" not in line:
            raise ConfigError(f"{place}: needs a scale")
        for key in line:
            if key not in known:
                raise ConfigError(f'{place}: unknown key "{key}"; {nearest(str(key), known)}')
        layers, components = line.get("layers", line.get("layer")), line.get("components", line.get("component"))
        if components is not None and not isinstance(components, str):
            if not isinstance(components, list) or not all(isinstance(part, str) for part in components):
                raise ConfigError(
                    f"{place}: components is {quoted(components)}; expected names such as attn and mlp.up"
                )
        pattern = Pattern(
            None if layers is None else read_layers(layers, place),
            None if components is None else tuple([components] if isinstance(components, str) else components),
        )
        rules.append((pattern, _number(line["scale"], f"{place}: scale")))
    shape = settings.get("model")
    return Scale(
        _number(settings.get("default", 1.0), f"{where}: default"),
        tuple(rules),
        shape if isinstance(shape, Mapping) else {},
        settings.get("embeddings"),
    )


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where} is {quoted(value)}; expected a number") from None
    if isinstance(value, bool):
        raise ConfigError(f"{where} is {quoted(value)}; expected a number")
    check_number(number, where)
    return number
