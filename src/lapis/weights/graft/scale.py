"""How strongly each part of a model is changed: one number, or a number per layers and components.

Written as `1.0`, as `0-7=0.5,8-23=1.0`, as `attn=1,mlp=0.5,12-23.mlp=0`, or in a YAML file (what `lapis plan` writes):

    default: 0.0                 # where no line below applies; 1.0 if left out
    scales:
      - {layers: 12-23, components: [attn.q, attn.k], scale: 1.0}
      - {layer: 3, scale: 0.5}

Later lines win over earlier ones. A component stands for those below it too: "attn" covers "attn.q".
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lapis.config import load_yaml, nearest
from lapis.errors import ConfigError
from lapis.families.base import Part

SHAPE = ("layers", "dim", "heads", "kv_heads", "ffn_dim")  # what a plan and the model that it is used on must share


@dataclass(frozen=True)
class ScaleRule:
    """One line: which parts, and their number. layers, components: None stands for all."""

    scale: float
    layers: tuple[int, ...] | None = None
    components: tuple[str, ...] | None = None

    def covers(self, part: Part) -> bool:
        if self.layers is not None and part.layer not in self.layers:
            return False
        return self.components is None or any(
            part.component == name or part.component.startswith(f"{name}.") for name in self.components
        )


@dataclass(frozen=True)
class Scale:
    """A scale for every part of a model.

    shape: of the model that it was made for, and embeddings: whether a graft is to add to these, where a plan says so.
    """

    default: float = 1.0
    rules: tuple[ScaleRule, ...] = ()
    shape: Mapping[str, Any] = field(default_factory=dict, compare=False)
    embeddings: str | None = None

    def of(self, part: Part) -> float:
        result = self.default
        for rule in self.rules:
            if rule.covers(part):
                result = rule.scale
        return result

    def to_json(self) -> Any:
        """A number where one number is all there is, else the mapping that the YAML file would hold."""
        if not self.rules:
            return self.default
        lines = []
        for rule in self.rules:
            line: dict[str, Any] = {"scale": rule.scale}
            if rule.layers is not None:
                line["layers"] = list(rule.layers)
            if rule.components is not None:
                line["components"] = list(rule.components)
            lines.append(line)
        return {"default": self.default, "scales": lines}

    def problems(self, parts: Iterable[Part], shape: Mapping[str, Any] | None = None) -> list[str]:
        """Rules that apply to nothing in a model, each as a line that names what is there; or that its shape differs.

        shape: the model's dim, layers and so on, where its family is known.
        """
        parts = list(parts)
        found = []
        for key in SHAPE:
            if shape and key in self.shape and shape.get(key) != self.shape[key]:
                return [f"scale: the plan was made for a model of {self.shape[key]} {key}; onto has {shape.get(key)}"]
        for rule in self.rules:
            if not any(rule.covers(part) for part in parts):
                layers = sorted({part.layer for part in parts if part.layer is not None})
                known = sorted({part.component for part in parts})
                odd = [c for c in rule.components or () if not any(k == c or k.startswith(c + ".") for k in known)]
                what = f'component "{odd[0]}"' if odd else f"layers {_spelled(rule.layers or ())}"
                groups = {name.rpartition(".")[0] for name in known} - {""}
                have = nearest(odd[0], [*known, *groups]) if odd else f"the model has layers {_spelled(layers)}"
                found.append(f"scale: {what} matches nothing; {have}")
        return found


def read_scale(value: "float | str | Path | Mapping[str, Any] | Scale", where: str = "scale") -> Scale:
    """A Scale from what a user gives: a number, text as above, a mapping, or the path of a YAML file."""
    if isinstance(value, Scale):
        return value
    if isinstance(value, Mapping):
        return _from_mapping(value, where)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Scale(_number(value, where))
    text = str(value).strip()
    if text.endswith((".yaml", ".yml")) or Path(text).is_file():
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
            continue
        found = re.fullmatch(r"(?:(\d+)(?:-(\d+))?)?\.?([A-Za-z_][\w.]*)?", what.strip())
        if not found or not what.strip():
            raise ConfigError(f'{where}: "{piece}" is not layers=number or component=number, such as 0-7=0.5 or mlp=1')
        layers = _layers(f"{found[1]}-{found[2] or found[1]}", where) if found[1] else None
        rules.append(ScaleRule(scale, layers, (found[3],) if found[3] else None))
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
        rules.append(
            ScaleRule(
                _number(line["scale"], f"{place}: scale"),
                None if layers is None else _layers(layers, place),
                None if components is None else tuple([components] if isinstance(components, str) else components),
            )
        )
    shape = settings.get("model")
    return Scale(
        _number(settings.get("default", 1.0), f"{where}: default"),
        tuple(rules),
        shape if isinstance(shape, Mapping) else {},
        settings.get("embeddings"),
    )


def _layers(value: Any, where: str) -> tuple[int, ...]:
    items = value if isinstance(value, list) else str(value).split(",")
    result: list[int] = []
    for item in items:
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(item))
        if not found or int(found[2] or found[1]) - int(found[1]) not in range(100_000):
            raise ConfigError(f"{where}: {item!r} is not a layer or a range such as 0-7")
        result += range(int(found[1]), int(found[2] or found[1]) + 1)
    return tuple(result)


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where} is {value!r}; expected a number") from None
    if not math.isfinite(number) or isinstance(value, bool):
        raise ConfigError(f"{where} is {value!r}; expected a finite number")
    return number


def _spelled(layers: Iterable[int]) -> str:
    layers = list(layers)
    if layers == list(range(layers[0], layers[-1] + 1)) if layers else False:
        return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers)) or "none"
