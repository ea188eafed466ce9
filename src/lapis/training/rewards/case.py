"""What a reward is given, and what it gives back. Leaves out: how rewards are combined (judge.py)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One reply. prompt: as the record has it. reply: text, without the end token. record: its line of the data.
    where: that line, for messages. ended: whether the model ended it. tokens: its length."""

    prompt: Any
    reply: str
    record: Record
    where: str
    ended: bool = True
    tokens: int = 0

    @property
    def told(self) -> dict[str, Any]:
        """The record as a reward function gets it."""
        return {**self.record, "_reply": {"ended": self.ended, "tokens": self.tokens}}


@dataclass(frozen=True)
class Failure:
    """Why there is no number."""

    why: str


class Reward(Protocol):
    """Scores replies, a batch at a time."""

    def check(self, records: Sequence[tuple[Record, str]]) -> None:
        """Raises DataError for a record (and its place) that this reward could never score."""

    def score(self, cases: Sequence[Case]) -> list[float | Failure]:
        """A number for each reply, or why there is none."""


def as_number(value: Any, where: str) -> float | Failure:
    """What a function returned, where it is a number that can be learned from."""
    if isinstance(value, bool) or (not isinstance(value, (int, float)) and hasattr(value, "item")):
        try:
            value = float(value)  # True, or an array or tensor of one number
        except (TypeError, ValueError, RuntimeError):
            return Failure(f"returned {type(value).__name__} for {where}; expected one number")
    if not isinstance(value, (int, float)):
        return Failure(f"returned {type(value).__name__} for {where}; expected a number")
    return float(value) if math.isfinite(value) else Failure(f"returned {float(value)} for {where}")
