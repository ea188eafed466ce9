"""The learning curve: sums over a few steps become one entry, and the entries become log.jsonl."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lapis.training.config import TrainConfig

Row = dict[str, Any]


class Window:
    """Sums since the last entry.

    Args:
        pace: Seconds per step before this window, smoothed over entries; 0 = not known.
        means: Metrics that are means, not sums.
    """

    def __init__(self, pace: float = 0.0, means: frozenset[str] = frozenset()) -> None:
        self.means, self.parts = means, 0
        self.loss, self.count, self.norm, self.scale = 0.0, 0, 0.0, 0.0
        self.steps, self.seconds, self.before = 0, 0.0, pace
        self.sums: dict[str, float] = {}

    def add(self, loss: float, count: int, norm: float, sums: Mapping[str, float], parts: int = 1) -> None:
        """Adds a step: its summed loss over `count` tokens, the norm of its gradient, and the objective's metrics,
        summed over `parts` micro-batches."""
        self.parts += parts
        self.loss, self.count, self.norm = self.loss + loss, self.count + count, norm
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @property
    def pace(self) -> float:
        """Seconds per step."""
        if not self.steps:
            return self.before
        now = self.seconds / self.steps
        return 0.7 * self.before + 0.3 * now if self.before else now

    def row(self, config: TrainConfig, *, step: int, total: int | None, tokens: int, seconds: float) -> Row:
        """The entry of the curve.

        Args:
            config: Of the run.
            step: Steps done.
            total: Steps of the run; None where it is bounded by time and its length is not fixed yet.
            tokens: Positions computed, in the whole run.
            seconds: Spent, in the whole run.

        Returns:
            loss: per supervised token (or whatever the objective counts). metrics: the objective's own, per the same
            count, or as means. share, seconds_left: of the whole run.
        """
        if total is not None:
            share, left = step / total, self.pace * (total - step)
        else:
            budget = (config.minutes or 0) * 60
            share, left = seconds / budget, budget - seconds
        size = self.sums.get("bytes")
        metrics = {
            name: value / max(1, self.parts if name in self.means else self.count)
            for name, value in self.sums.items()
            if name not in ("tokens", "bytes")
        }
        return {
            "step": step,
            "loss": self.loss / self.count,
            "bits_per_byte": self.loss / math.log(2) / size if size else None,
            "metrics": metrics,
            "lr": config.lr * self.scale,
            "grad_norm": self.norm,
            "tokens": tokens,
            "tokens_per_second": self.sums.get("tokens", 0.0) / max(self.seconds, 1e-9),
            "seconds": seconds,
            "train_seconds": self.seconds,
            "share": min(share, 1.0),
            "seconds_left": max(left, 0.0),
        }


def write_curve(path: Path, log: list[Row]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")


def read_curve(path: Path) -> list[Row]:
    """The reverse of `write_curve`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
