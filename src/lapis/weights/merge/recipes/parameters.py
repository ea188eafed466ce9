"""What a method's parameter is for a tensor: scopes, filters and gradients, by mergekit's rules.

A setting is a value, a list (a gradient over the layers of a slice, interpolated at i / (n - 1)), or a list of
`{filter, value}`, where a filter is a part of a tensor's name and the first that matches counts. It is looked for at
the input, then the output slice, the module, and the top.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

from lapis.config import check_number, nearest, truth
from lapis.errors import ConfigError
from lapis.parsing import quoted
from lapis.weights.merge.methods import METHODS, Method, Parameter

_ANYWHERE = {name for method in METHODS.values() for name in method.parameters} | {"int8_mask"}


@dataclass
class Resolver:
    """Answers what a parameter is for a tensor, and remembers which gradients gave their first value."""

    method: str
    scopes: Sequence[tuple[str, Mapping[str, Any]]]  # every mapping of parameters, with the place where it stands
    first_values: dict[str, list[str]] = field(default_factory=dict)

    def value(
        self, parameter: Parameter, tensor: str, t: float | None, scopes: Sequence[Mapping[str, Any]], model: str = ""
    ) -> Any:
        """The value of a parameter for a tensor.

        t: 0 to 1, the layer's place in its slice; None outside the layers, where a gradient gives its first value.
        scopes: the mappings to look in, in order. model: the input that it is for, if it is for one.
        Raises ConfigError where it is set nowhere and has no default.
        """
        for scope in scopes:
            if parameter.name in scope:
                is_set, value = self._evaluate(scope[parameter.name], parameter, tensor, t)
                if is_set:
                    return value
        if parameter.default is Parameter.MISSING:
            of = f" for {model}" if model else ""
            raise ConfigError(f"{self.method}: {parameter.name} is not set{of} ({tensor})")
        return parameter.default

    def _evaluate(self, setting: Any, parameter: Parameter, tensor: str, t: float | None) -> tuple[bool, Any]:
        conditions = _conditions(setting)
        if not conditions:
            return True, self._gradient(setting, parameter, tensor, t)
        for condition in conditions:
            word = condition.get("filter")
            if word in (None, "*") or str(word) in tensor:
                return True, self._gradient(condition["value"], parameter, tensor, t)
        return False, None

    def _gradient(self, value: Any, parameter: Parameter, tensor: str, t: float | None) -> Any:
        if not isinstance(value, list):
            return _scalar(value, parameter, self.method)
        values = [_scalar(item, parameter, self.method) for item in value]
        if t is None:
            t = 0.0
            if any(item != values[0] for item in values):
                self.first_values.setdefault(f"{parameter.name} = {values[0]}", []).append(tensor)
        if not all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in values):
            return values[int(t * (len(values) - 1))]
        scaled = t * (len(values) - 1)
        low = int(scaled)
        high = min(len(values) - 1, low + 1)
        return (1 - (scaled - low)) * values[low] + (scaled - low) * values[high]

    def problems(self, names: set[str]) -> list[str]:
        """Filters that are in no tensor's name, with the nearest word that is in one."""
        words = {word for name in names for word in (name, *name.split("."))}
        lines: dict[str, None] = {}
        for place, parameters in self.scopes:
            for parameter, setting in parameters.items():
                for condition in _conditions(setting):
                    word = condition.get("filter")
                    if word not in (None, "*") and not any(str(word) in name for name in names):
                        near = _near_word(str(word), words)
                        lines[f'{place}: {parameter}: the filter "{word}" matches no tensor; {near}'] = None
        return list(lines)

    def notes(self) -> list[str]:
        """What a gradient gave outside the blocks, which surprises for the head."""
        return [
            f"{', '.join(dict.fromkeys(tensors))}: outside the layers, take the first value of a gradient: {value}"
            for value, tensors in self.first_values.items()
        ]


def _near_word(word: str, words: set[str]) -> str:
    hint = nearest(word, words)
    return (
        hint if hint.startswith("did") else "a filter is a part of a tensor's name, such as self_attn or mlp.down_proj"
    )


def check_parameters(method: Method, parameters: Mapping[str, Any], where: str) -> list[str]:
    """Notes on parameters that do nothing here; raises for those that exist nowhere."""
    notes = []
    for name, setting in parameters.items():
        if name not in _ANYWHERE:
            raise ConfigError(f'{where}: unknown parameter "{name}"; {nearest(str(name), method.parameters)}')
        if name not in method.parameters:
            if name != "int8_mask":
                notes.append(f"{name} does nothing in {method.name}")
            continue
        for condition in _conditions(setting):
            only(condition, {"filter", "value"}, f"{where}: {name}")
            if "value" not in condition:
                raise ConfigError(f"{where}: {name}: the filter {quoted(condition.get('filter'))} has no value")
        for value in [c["value"] for c in _conditions(setting)] or [setting]:
            if value == [] or value is None:
                raise ConfigError(f"{where}: {name} is empty")
            for item in value if isinstance(value, list) else [value]:
                _scalar(item, method.parameters[name], f"{where}: {name}")
    return notes


def _conditions(setting: Any) -> list[Mapping[str, Any]]:
    """The filtered values of a setting; none where it is a plain value or a gradient."""
    entries = [setting] if isinstance(setting, Mapping) else setting if isinstance(setting, list) else []
    return entries if entries and all(isinstance(entry, Mapping) for entry in entries) else []


def _scalar(value: Any, parameter: Parameter, where: str) -> Any:
    """A value as the parameter's type; numbers in text are numbers, on and off are true and false."""
    kind = parameter.kind
    if get_origin(kind) is not None:
        if value in get_args(kind):
            return value
    elif kind is bool:
        if (switch := truth(value)) is not None:
            return switch
    elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = float("nan")
        if number == number and abs(number) != float("inf") and (kind is float or number == int(number)):
            check_number(number, f"{where}: {parameter.name}")
            least, most = parameter.span
            if not least <= number <= most:
                expected = f"from {least:g} to {most:g}" if most < math.inf else f"{least:g} or more"
                raise ConfigError(f"{where}: {parameter.name} is {number:g}; expected {expected}")
            return kind(number)
    spelled = " or ".join(get_args(kind)) if get_origin(kind) else {bool: "true or false"}.get(kind, "a number")
    raise ConfigError(f"{where}: {parameter.name} is {quoted(value)}; expected {spelled}")


def only(entry: Any, known: set[str], where: str) -> None:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: expected key: value lines, got {quoted(entry)}")
    for key in entry:
        if key not in known:
            raise ConfigError(f'{where}: unknown key "{key}"; {nearest(str(key), known)}')
