"""Settings: dataclass <- YAML <- key=value. An unknown key is an error that names the nearest one.

One dataclass is the only place where an option, its type and its default are written. Leaves out: environment
variables, includes, interpolation.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lapis.errors import ConfigError

T = TypeVar("T")


def nearest(word: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` or the list of what is known; a suffix for an error line."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(sorted(known))}"


def load_yaml(path: Path | str) -> dict[str, Any]:
    """A YAML file as a mapping. Raises ConfigError with the line where it does not parse."""
    path = Path(path)
    try:
        loaded = _UniqueKeys(path.read_text(encoding="utf-8-sig")).get_single_data()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(loaded, dict):
        found = "nothing" if loaded is None else type(loaded).__name__
        raise ConfigError(f"{path}: holds {found}; expected key: value lines")
    return loaded


def override(settings: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Settings with `key=value` and `outer.inner=value` applied; values are read as YAML."""
    result: dict[str, Any] = {**settings}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f'"{assignment}": expected key=value')
        *outer, last = key.split(".")
        place = result
        for name in outer:
            inner = place.get(name)
            place[name] = dict(inner) if isinstance(inner, Mapping) else {}
            place = place[name]
        try:
            place[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f'"{assignment}": the value is not YAML') from None
    return result


def build(cls: type[T], settings: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `cls`; nested dataclasses are built from nested mappings.

    Raises ConfigError for a key that is not a field (the nearest is named), a missing one, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in fields:
            raise ConfigError(f'{where}: unknown key "{key}"; {nearest(str(key), fields)}')
        values[key] = _fit(hints[key], value, f"{where}: {key}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f'{where}: "{name}" is missing')
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _fit(hint: Any, value: Any, where: str) -> Any:
    """The value as the annotated type, or ConfigError. Widens int to float and list to tuple, nothing else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        if len(options := [option for option in args if option is not type(None)]) == 1:
            return _fit(options[0], value, where)  # its own words say best what is wrong
        for option in args:
            if option is not type(None):
                try:
                    return _fit(option, value, where)
                except ConfigError:
                    continue
        raise ConfigError(f"{where} is {value!r}; expected {_spelled(hint)}")
    if origin is typing.Literal:
        if value in args:
            return value
        raise ConfigError(f"{where} is {value!r}; {nearest(str(value), [str(a) for a in args])}")
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, where)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return origin(_fit(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {key: _fit(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 3e-4 as text
        except ValueError:
            pass
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ConfigError(f"{where} is {value!r}; expected {_spelled(hint)}")


def _spelled(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


class _UniqueKeys(yaml.SafeLoader):
    """A SafeLoader that refuses a key written twice, which plain YAML loaders drop silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen and key != "<<":
                raise yaml.MarkedYAMLError(problem=f'the key "{key}" stands twice', problem_mark=key_node.start_mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)
