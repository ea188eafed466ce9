"""Rewards that can be checked: a number, JSON, an exact answer, a length, the end token.

Each is a function of its options that gives `reward(prompt, reply, record) -> float`, from 0 to 1. Leaves out: the
language of a reply (language.py), units, symbolic equality.
"""

import json as _json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from lapis.errors import ConfigError

Function = Callable[[Any, str, Mapping[str, Any]], float]

_NUMBER = re.compile(r"[-−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?")
_MARKS = ("####", "\\boxed{")  # after the last of these stands the answer


def number(field: str = "final", tolerance: float = 0.0) -> Function:
    """1 where the reply's number is the record's. The reply's number is the one after the last `####` (or in the last
    \\boxed{}), where there is such a mark, else the last in the reply. field: of the record; `answer` may hold a worked
    answer that ends so. tolerance: how far off it may be."""

    def reward(prompt: Any, reply: str, record: Mapping[str, Any]) -> float:
        answer, right = number_in(reply), number_in(str(record[field]))
        if right is None:
            raise ValueError(f"the record's {field} holds no number")
        return float(answer is not None and abs(answer - right) <= Decimal(str(tolerance)))

    return reward


def number_in(text: str) -> Decimal | None:
    """The number that a text ends on; thousands may have commas."""
    text = text[-4000:]
    marks = [text.rfind(mark) + len(mark) for mark in _MARKS if mark in text]
    numbers = _NUMBER.findall(text[max(marks) :])[:1] if marks else _NUMBER.findall(text)[-1:]
    if not numbers:
        return None
    try:
        return Decimal(numbers[0].replace(",", "").replace("−", "-").rstrip("."))
    except InvalidOperation:
        return None


def exact(field: str = "answer", partial: bool = False) -> Function:
    """1 where the reply is the record's text, but for white space around it. partial: else the share of its characters
    that stand right from the beginning on, of the longer of the two."""

    def reward(prompt: Any, reply: str, record: Mapping[str, Any]) -> float:
        answer, right = reply.strip(), str(record[field]).strip()
        if answer == right or not partial:
            return float(answer == right)
        same = next(
            (i for i, (a, b) in enumerate(zip(answer, right, strict=False)) if a != b), min(len(answer), len(right))
        )
        return same / max(len(answer), len(right))

    return reward


def json(keys: list[str] = [], only: bool = False) -> Function:  # noqa: B006 (never changed)
    """1 where the reply is one JSON object that has all the keys. only: and no others. A fence of ``` around it is
    taken off. Keys that stand twice, NaN and Infinity are not JSON."""
    required = set(keys)

    def reward(prompt: Any, reply: str, record: Mapping[str, Any]) -> float:
        text = re.sub(r"\A\s*```(?:json)?\s*\n(.*)\n\s*```\s*\Z", r"\1", reply, flags=re.DOTALL)
        try:
            value = _json.loads(text, parse_constant=_refused, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            return 0.0
        return float(isinstance(value, dict) and required <= set(value) and not (only and set(value) - required))

    return reward


def _refused(word: str) -> None:
    raise ValueError(word)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def length(least: int = 1, most: int = 200, unit: Literal["words", "characters", "tokens"] = "words") -> Function:
    """1 where the reply is that long; outside, less by its distance as a share of the bound, down to 0."""
    if not 0 <= least <= most:
        raise ConfigError(f"reward length: least is {least} and most is {most}; expected 0 <= least <= most")

    def reward(prompt: Any, reply: str, record: Mapping[str, Any]) -> float:
        sizes = {"words": len(reply.split()), "characters": len(reply), "tokens": record["_reply"]["tokens"]}
        size: int = sizes[unit]
        if size < least:
            return size / least
        return max(0.0, 1 - (size - most) / max(most, 1)) if size > most else 1.0

    return reward


def ends() -> Function:
    """1 where the model ended the reply by itself."""

    def reward(prompt: Any, reply: str, record: Mapping[str, Any]) -> float:
        return float(record["_reply"]["ended"])

    return reward
