"""The learning curve: sums over a few steps become one entry, and the entries become log.jsonl."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lapis.training.config import TrainConfig

if TYPE_CHECKING:
    from lapis.training.loop.state import TrainState

Row = dict[str, Any]


class Window:
    """Sums since the last entry. pace: seconds per step, smoothed over entries. means: metrics that are no sums."""

    def __init__(self, pace: float = 0.0, means: frozenset[str] = frozenset()) -> None:
        self.means, self.parts = means, 0
        self.loss, self.count, self.norm, self.scale = 0.0, 0, 0.0, 0.0
        self.steps, self.seconds, self.before = 0, 0.0, pace
        self.sums: dict[str, float] = {}

    def add(self, loss: float, count: int, norm: float, sums: Mapping[str, float], parts: int = 1) -> None:
        """One step: its summed loss over `count` tokens, the norm of its gradient, and the objective's metrics, summed
        over `parts` micro-batches."""
        self.parts += parts
        self.loss, self.count, self.norm = self.loss + loss, self.count + count, norm
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    @property
    def pace(self) -> float:
        if not self.steps:
            return self.before
        now = self.seconds / self.steps
        return 0.7 * self.before + 0.3 * now if self.before else now

    def row(self, state: "TrainState", config: TrainConfig) -> Row:
        """The entry. loss: for each supervised token (or whatever the objective counts). metrics: the objective's own,
        for each of the same, or as means. share, seconds_left: of the whole run."""
        total = state.schedule.total
        if total is not None:
            share, left = state.step / total, self.pace * (total - state.step)
        else:  # bounded by time, and its length is not fixed yet
            budget = (config.minutes or 0) * 60
            share, left = state.seconds / budget, budget - state.seconds
        size = self.sums.get("bytes")
        metrics = {
            name: value / max(1, self.parts if name in self.means else self.count)
            for name, value in self.sums.items()
            if name not in ("tokens", "bytes")
        }
        return {
            "step": state.step,
            "loss": self.loss / self.count,
            "bits_per_byte": self.loss / math.log(2) / size if size else None,
            "metrics": metrics,
            "lr": config.lr * self.scale,
            "grad_norm": self.norm,
            "tokens": state.tokens,
            "tokens_per_second": self.sums.get("tokens", 0.0) / max(self.seconds, 1e-9),
            "seconds": state.seconds,
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
