"""JSON from files that nobody vouches for: text in, plain values out, within limits that no file of a model comes near.

Whatever a text holds, it is read in time and memory that grow with its length alone, or refused in one line that quotes
no more than a few words of it. YAML has the same limits, and its reader in config.py.
"""

import json
import math
import re
import reprlib
from collections.abc import Mapping
from itertools import islice
from typing import Any

LEVELS = 64  # of lists and objects within each other
DIGITS = 40  # of a whole number; any that a float can hold, and more than any size, id or seed has
VALUES = 4_000_000  # in one text; a vocabulary of a million tokens with its merges has fewer
_BARE = re.compile(r"\\u[dD][89a-fA-F]")


class _Quoting(reprlib.Repr):
    """At most four entries of two levels, and sixty characters of each text."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple = 2, 4, 4
        self.maxstring = self.maxlong = self.maxother = 60

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Without the sorting of all keys that the library's own does."""
        if level <= 0:
            return "{...}"
        shown = [f"{self.repr1(k, level - 1)}: {self.repr1(x[k], level - 1)}" for k in islice(x, 4)]
        return f"{{{', '.join(shown + ['...'] * (len(x) > 4))}}}"


_quoting = _Quoting()


class ParseError(ValueError):
    """A text that is not JSON, or goes beyond a limit. The message is one short line without a path."""


def parse_json(text: str | bytes, *, constants: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        text: The text; bytes are UTF-8, with or without a byte order mark.
        constants: Whether NaN and Infinity, which are no JSON and stand in published configs, are read.

    Raises:
        ParseError: For what is not JSON (with the place), a key that stands twice, half a character, and what is beyond
            the limits above.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ParseError(f"not UTF-8 at byte {error.start}") from None
    opened = text.count("[") + text.count("{")
    if opened + text.count(",") > VALUES:
        raise ParseError(f"holds more than {VALUES:,} values")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_constant=None if constants else _refuse_constant,
        )
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise ParseError(f"not JSON at {place}: {error.msg}") from None
    except RecursionError:
        raise ParseError("nested too deeply") from None
    if opened > LEVELS:
        _check_levels(value)
    if _BARE.search(text):
        _check_characters(value)
    return value


def quoted(value: Any) -> str:
    """A value as an error line shows it: short, whatever it is."""
    return _quoting.repr(value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ParseError(f'the key "{name:.60}" stands twice')
            seen.add(name)
    return result


def _integer(digits: str) -> int:
    if len(digits) > DIGITS + 1:
        raise ParseError(f"holds a number of {len(digits):,} digits")
    return int(digits)


def _refuse_constant(word: str) -> None:
    raise ParseError(f"{word} is not JSON")


def _check_levels(value: Any) -> None:
    level = [value]
    for _ in range(LEVELS):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) is dict or type(inner) is list
        ]
        if not level:
            return
    raise ParseError("nested too deeply")


def _check_characters(value: Any) -> None:
    """JSON can spell half of a surrogate pair, which is no text and can be written nowhere."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ParseError("holds half a surrogate pair") from None


def finite_json(value: Any) -> Any:
    """A value that JSON has: NaN and infinity, which it has not, become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(item) for item in value]
    return value
