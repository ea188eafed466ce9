"""What a reward is given and what it gives back; and several rewards with weights as one number per reply.

Leaves out: rules that multiply rewards, or that order them.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """One reply to be scored.

    Attributes:
        prompt: As the record has it.
        reply: Text, without the end token.
        record: Its line of the data.
        where: File and line, for messages.
        ended: Whether the model ended the reply.
        tokens: Its length.
    """

    prompt: Any
    reply: str
    record: Record
    where: str
    ended: bool = True
    tokens: int = 0

    @property
    def full_record(self) -> dict[str, Any]:
        """The record as a reward function gets it."""
        return {**self.record, "_reply": {"ended": self.ended, "tokens": self.tokens}}


@dataclass(frozen=True)
class Failure:
    """Why a reply has no reward."""

    why: str


class RewardFunction(Protocol):
    """Scores replies, a batch at a time."""

    def check(self, records: Sequence[tuple[Record, str]]) -> None:
        """Raises DataError for a record (and its place) that this reward could never score."""

    def score(self, cases: Sequence[Case]) -> list[float | Failure]:
        """A number for each reply, or why there is none."""


def as_number(value: Any, where: str) -> float | Failure:
    """The value that a function returned, where it is a number that can be learned from."""
    if isinstance(value, bool) or (not isinstance(value, (int, float)) and hasattr(value, "item")):
        try:
            value = float(value)  # True, or an array or tensor of one number
        except (TypeError, ValueError, RuntimeError):
            return Failure(f"returned {type(value).__name__} for {where}; expected one number")
    if not isinstance(value, (int, float)):
        return Failure(f"returned {type(value).__name__} for {where}; expected a number")
    return float(value) if math.isfinite(value) else Failure(f"returned {float(value)} for {where}")


@dataclass(frozen=True)
class Scores:
    """The rewards of some replies.

    Attributes:
        total: The weighted sum for each reply; NaN where a reward failed.
        parts: Each reward alone, before its weight.
        failures: The first reason of each reward that failed.
        failed: How often each failed.
    """

    total: list[float]
    parts: dict[str, list[float]]
    failures: dict[str, str]
    failed: Counter[str]

    @property
    def first_failure(self) -> str:
        return next((f"{name} {why}" for name, why in self.failures.items()), "no reply has a reward")


class Judge:
    """Several rewards as one number per reply, which is NaN where one of them failed.

    Args:
        rewards: (name, weight, reward) of each.
        described: The same as JSON.
        notes: Lines to show to the user.
    """

    def __init__(
        self,
        rewards: Sequence[tuple[str, float, RewardFunction]],
        described: Sequence[object] = (),
        notes: Sequence[str] = (),
    ) -> None:
        self.rewards, self.described, self.notes = list(rewards), list(described), list(notes)
        self.names = [name for name, _, _ in rewards]

    def check(self, records: Sequence[tuple[Record, str]]) -> None:
        """Raises DataError, naming the record, where one of the rewards could never score it."""
        for _, _, reward in self.rewards:
            reward.check(records)

    def score(self, cases: Sequence[Case]) -> Scores:
        parts: dict[str, list[float]] = {}
        failures: dict[str, str] = {}
        failed: Counter[str] = Counter()
        for name, _, reward in self.rewards:
            parts[name] = []
            for value in reward.score(cases):
                if isinstance(value, Failure):
                    failures.setdefault(name, value.why)
                    failed[name] += 1
                    value = math.nan
                parts[name].append(value)
        total = [sum(weight * parts[name][i] for name, weight, _ in self.rewards) for i in range(len(cases))]
        return Scores(total, parts, failures, failed)
