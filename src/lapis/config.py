"""Settings: dataclass <- YAML <- key=value. An unknown key is an error that names the nearest one.

One dataclass is the only place where an option, its type and its default are written, and this file's reader is the
one for all YAML. It knows no environment variables, includes or interpolation.
"""

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lapis.errors import ConfigError
from lapis.parsing import DIGITS, LEVELS, quoted

YAML_LIMIT = 1_000_000  # bytes
_COMPARED = 2_000  # words that an unknown one is compared with
NODES = 20_000  # in one text, with what aliases name written out

T = TypeVar("T")


def environment_number(name: str, default: int) -> int:
    """A whole number that torchrun puts into the environment (RANK, WORLD_SIZE, ...), or `default`.

    Raises:
        ConfigError: It is something else.
    """
    value = os.environ.get(name, "").strip()
    try:
        return int(value) if value else default
    except ValueError:
        raise ConfigError(
            f'{name} is "{value[:40]}" in the environment; torchrun sets it to a whole number, unset it to run alone'
        ) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean "x"?` or the list of what is known; a suffix for an error line."""
    known = list(islice(known, _COMPARED))
    close = difflib.get_close_matches(word[:100], known, n=1, cutoff=0.5)
    return f'did you mean "{close[0]:.100}"?' if close else f"known: {', '.join(sorted(known)):.1000}"


def load_yaml(path: Path | str) -> dict[str, Any]:
    """A YAML file as a mapping, read as `parse_yaml` reads.

    Args:
        path: The file, in UTF-8, with or without a byte order mark.

    Returns:
        What stands at the top of the file, key by key.

    Raises:
        ConfigError: For a file that cannot be read, is not YAML (with the line), or holds no mapping.
    """
    return _mapping(parse_yaml(_read_text(path), str(path)), path)


def load_yaml_documents(path: Path | str) -> list[dict[str, Any]]:
    """The same for a file of several documents with `---` between them; empty ones are left out.

    Raises:
        ConfigError: As `load_yaml`; also for a file without a document.
    """

    def every(loader: _Loader) -> list[Any]:
        documents = []
        while loader.check_data():  # type: ignore[no-untyped-call]
            documents.append(loader.get_data())
        return documents

    loaded = [each for each in _parse(_read_text(path), str(path), every) if each is not None] or [None]
    return [_mapping(each, path) for each in loaded]


def _mapping(loaded: Any, path: Path | str) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        content = "nothing" if loaded is None else "a list" if isinstance(loaded, list) else f"only {quoted(loaded)}"
        raise ConfigError(f"{path}: holds {content}; give a file of key: value lines")
    return loaded


def _read_text(path: Path | str) -> str:
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(YAML_LIMIT + 1)
        return raw.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give a YAML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; give a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; give a YAML file, in UTF-8") from None


def parse_yaml(text: str, where: str) -> Any:
    """A YAML text, with plain words and numbers read as a person means them.

    `on`, `off`, `yes` and `no` are words (where a setting is true or false, `build` takes them so), `2e-4` and `1_000`
    are numbers, `010` is ten, and dates and times are text: the core schema of YAML 1.2, with underscores in numbers.

    Args:
        text: The YAML.
        where: What an error begins with: a path, or the assignment on a command line.

    Raises:
        ConfigError: For what is not YAML, with the line, for a key that stands twice, and for what is longer, deeper or
            larger, with its aliases written out, than any settings are.
    """
    return _parse(text, where, lambda loader: loader.get_single_data())


def _parse(text: str, where: str, read: Callable[["_Loader"], Any]) -> Any:
    if len(text) > YAML_LIMIT:
        raise ConfigError(f"{where}: more than {YAML_LIMIT:,} bytes of YAML, which is the limit")
    try:
        return read(_Loader(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        kind = "" if problem.endswith(_TWICE) else "not YAML: "  # which takes the last of them
        raise ConfigError(f"{place}: {kind}{problem:.200}") from None
    except RecursionError:
        raise ConfigError(f"{where}: lists and mappings are nested too deeply") from None
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:  # a tag over what is no such value
        raise ConfigError(f"{where}: not YAML: {error!s:.200}") from None


def dump_yaml(settings: Mapping[str, Any]) -> str:
    """Settings as YAML that `parse_yaml`, and every reader of YAML 1.1, reads back as they are."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def truth(value: Any) -> bool | None:
    """True or False for a bool, and for on, off, yes, no, true and false in any case; None for all else."""
    return value if isinstance(value, bool) else _TRUTH.get(value.lower()) if isinstance(value, str) else None


_NO_YAML = ("*", "@", "%", "`")  # `*` refers to an anchor, of which one value can have none before it


def override(settings: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Settings with `key=value` and `outer.inner=value` applied; values are read as YAML.

    What no YAML value begins with, such as the star of a glob, begins plain text.
    """
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
        place[last] = text if text.startswith(_NO_YAML) else parse_yaml(text, f'"{assignment}"')
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
            raise ConfigError(f'{where}: unknown key "{key!s:.60}"; {nearest(f"{key!s:.60}", fields)}')
        values[key] = _fit(hints[key], value, f"{where}: {key}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f'{where}: "{name}" is missing')
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_number(value: float, where: str) -> None:
    """The one place where a number of settings is checked, before what it is a number of looks at its range.

    Args:
        value: A number from a file, a command line or a program.
        where: What an error begins with.

    Raises:
        ConfigError: For NaN, infinity, and what no setting means: a whole number of more than 63 bits, a size beyond
            1e30 or below 1e-30.
    """
    if isinstance(value, int):
        if not -(2**63) < value < 2**63:
            raise ConfigError(f"{where} is {quoted(value)}; expected a whole number of at most 63 bits")
    elif not math.isfinite(value):
        raise ConfigError(f"{where} is {value}; expected a finite number")
    elif value and not 1e-30 <= abs(value) <= 1e30:
        raise ConfigError(f"{where} is {value:g}; expected 0, or a number between 1e-30 and 1e30")


def check_numbers(settings: Any, where: str) -> None:
    """Checks every number of a dataclass, also those in lists, as `check_number` does."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, (int, float)):
                check_number(item, f"{where}: {field.name}")


def _fit(hint: Any, value: Any, where: str) -> Any:
    """`_typed`, and where that is a number, one that a setting can be."""
    result = _typed(hint, value, where)
    if isinstance(result, (int, float)):
        check_number(result, where)
    return result


def _typed(hint: Any, value: Any, where: str) -> Any:
    """The value as the annotated type, or ConfigError. Widens int to float and list to tuple, nothing else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and (value is None or (_means_none(value) and not {str, bool, Any} & set(args))):
            return None
        if len(options := [option for option in args if option is not type(None)]) == 1:
            return _fit(options[0], value, where)  # its own words say best what is wrong
        for option in args:
            if option is not type(None):
                try:
                    return _fit(option, value, where)
                except ConfigError as error:
                    if str(error).startswith((f"{where}.", f"{where}[")):  # it fits but for something in it
                        raise
        raise ConfigError(f"{where} is {quoted(value)}; expected {_spelled(hint)}")
    if origin is typing.Literal:
        if value in args:
            return value
        word = {True: "on", False: "off", None: ""}[truth(value)]
        if word in args:
            return word
        raise ConfigError(f"{where} is {quoted(value)}; {nearest(quoted(value), [str(a) for a in args])}")
    if dataclasses.is_dataclass(hint) and (isinstance(value, Mapping) or truth(value)):
        return build(typing.cast(type, hint), value if isinstance(value, Mapping) else {}, where)
    if origin in (list, tuple) and args[0] is str and isinstance(value, str):
        return origin([value])  # one word where several may stand
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return origin(_fit(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {key: _fit(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is bool and (switch := truth(value)) is not None:
        return switch
    if hint in (int, float) and truth(value) is False:
        return hint(0)  # weight_decay: off, eval_every: no
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e3 steps
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    raise ConfigError(f"{where} is {quoted(value)}; expected {_spelled(hint)}")


def _means_none(value: Any) -> bool:
    """Whether a word says that there is none, as `lora: off` does."""
    return truth(value) is False or (isinstance(value, str) and value.lower() in ("none", "null"))


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "on or off", Path: "a path"}


def _spelled(hint: Any) -> str:
    """A type in words: "auto or a whole number"."""
    if dataclasses.is_dataclass(hint):
        return f"a mapping with {', '.join(field.name for field in dataclasses.fields(hint))}"
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spelled(option) for option in args if option is not type(None))
    if origin is typing.Literal:
        return " or ".join(map(str, args))
    if origin in (list, tuple, dict):
        return "a mapping" if origin is dict else "a list"
    return str(_WORDS.get(hint) or getattr(hint, "__name__", hint))


_TRUTH = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
_INT = re.compile(r"[-+]?(?:[0-9]+(?:_[0-9]+)*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9]+(?:_[0-9]+)*)(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_TWICE = '" stands twice; leave one of them out'
_PLAIN = {  # tag -> pattern of a plain word and its first characters, tried in this order
    "null": (re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    "bool": (re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    "int": (_INT, list("-+0123456789")),
    "float": (_FLOAT, list("-+.0123456789")),
    "merge": (re.compile(r"<<"), ["<"]),
}


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the plain words above, which refuses a key that stands twice and what is beyond the limits."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = self._nodes = 0
        self._sizes: dict[int, int] = {}  # nodes within one that an alias may name, itself included

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Counts, and counts what an alias names again for each time that it is named."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark, before = event.start_mark, self._nodes
        self._level += 1
        node = super().compose_node(parent, index)
        self._level -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise yaml.MarkedYAMLError(problem=f"*{event.anchor:.60} is in itself", problem_mark=mark)
            self._nodes += self._sizes[id(node)]
        else:
            self._nodes += 1
            if event.anchor is not None:
                self._sizes[id(node)] = self._nodes - before
        if self._nodes > NODES or self._level > LEVELS:
            what = f"more than {NODES:,} values" if self._nodes > NODES else "nested too deeply"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = getattr(key_node, "value", None)
            if isinstance(key, str) and key in seen and key != "<<":
                problem = f'the key "{key:.60}{_TWICE}'
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        try:
            str(value).encode()
        except UnicodeEncodeError:  # YAML can spell half of a surrogate pair, which is no text
            mark: Any = node.start_mark
            raise yaml.MarkedYAMLError(problem="half a surrogate pair", problem_mark=mark) from None
        return value

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """Python's reading: digits are decimal also after a zero, underscores separate."""
        text = str(self.construct_scalar(node)).lower()
        try:
            if node.tag.endswith(":float"):
                return float(text.replace(".inf", "inf").replace(".nan", "nan"))
            if len(text) > DIGITS + 3:
                raise ValueError
            return int(text, 0 if text.lstrip("+-")[:2] in ("0x", "0o", "0b") else 10)
        except ValueError:
            raise yaml.MarkedYAMLError(
                problem=f"{text[:40]} is no number that can be read", problem_mark=node.start_mark
            ) from None


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes what either version of YAML would not read as text."""


_Loader.yaml_implicit_resolvers = {}  # those of YAML 1.1 go
_Loader.yaml_constructors = {  # and what a tag makes that no setting is: dates, sets, bytes
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in ("null", "bool", "str", "seq", "map")
}
for _tag, (_pattern, _first) in _PLAIN.items():
    _whole = re.compile(f"(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, _first)
    if _tag in ("int", "float"):
        _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, _first)
for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)
