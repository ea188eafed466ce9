"""Several rewards with weights, as one number per reply; and what failed.

A reply has a reward where each of the rewards has one; else it has none (NaN), and is counted. Leaves out: rules that
multiply rewards, or that order them.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lapis.training.rewards.case import Case, Failure, Record, Reward


@dataclass(frozen=True)
class Scores:
    """total: for each reply, NaN where a reward failed. parts: each reward alone, before its weight. failures: for
    each reward that failed, the first reason. failed: how often."""

    total: list[float]
    parts: dict[str, list[float]]
    failures: dict[str, str]
    failed: Counter[str]

    @property
    def first_failure(self) -> str:
        return next((f"{name} {why}" for name, why in self.failures.items()), "no reply has a reward")


class Judge:
    """rewards: (name, weight, reward). described: of each, as JSON. notes: for the person who waits."""

    def __init__(
        self, rewards: Sequence[tuple[str, float, Reward]], described: Sequence[object] = (), notes: Sequence[str] = ()
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
