"""The learning curve of a run, and what a finished run gives: TrainResult, and the files of its folder.

A model folder that everything loads, with log.jsonl (the learning curve, whose entries are sums over a few steps) and
training.json (settings and figures) beside it. What a clock said is in times.json, so that all other files of a run of
so many steps are the same bytes whenever and wherever they are made, and after any number of kills.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lapis.model.transformer import Transformer
from lapis.text.tokenizer.tokenizer import Tokenizer
from lapis.training.config import TrainConfig
from lapis.training.objectives.objective import Objective
from lapis.training.setup import lora

Row = dict[str, Any]

TIMES = "times.json"
OF_TIME = ("share", "tokens_per_second", "seconds", "train_seconds", "seconds_left", "sample")  # of a row of the curve
OF_MACHINE = (*OF_TIME, "predicted", "memory_bytes")  # of a result


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

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: value for name, value in vars(self).items() if name != "means"}

    def restore(self, numbers: Mapping[str, Any]) -> None:
        """The reverse of `to_json`."""
        for name in self.to_json().keys() & numbers.keys():
            setattr(self, name, numbers[name])

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


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        out: Its folder.
        steps: Updates done.
        loss: Of the last entry of the curve, per supervised count (nats per token for texts).
        bits_per_byte: Of the last entry, for texts.
        tokens: Positions computed.
        seconds: Spent on steps, evaluations and checkpoints, over all restarts.
        tokens_per_second: While updating.
        threads: What was used, so that a next run of the same shape need not measure.
        precision: The same.
        log: The learning curve.
        metrics: The objective's own, over the last tenth of the curve.
        held_out: Held-out metrics of the weights that were written; empty where nothing is held out.
        best_step: The step of these weights, where the run ends with the best, or with the last within the limits.
        overfitting: A sentence where the held-out loss rose again while the run went on.
        start: Held-out metrics before the first step, where there were limits.
        ended: Why the run ended early, or with other weights than the last; None where it did not.
        memory_bytes: The most that the process has held, of the GPU where it trains on one, else of the machine.
        skipped: Batches that a guard left out: step, what was wrong, and which of the data they were.
        changes: Settings that were another when the run went on: after which step, and what.
        predicted: What `seconds` and `memory_bytes` were to be, by the first steps (`after_steps`), and `steps` where
            the run is bounded by time; empty in runs of fewer steps.
    """

    out: Path
    steps: int
    loss: float
    bits_per_byte: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    threads: int
    precision: str
    log: list[dict[str, Any]]
    metrics: dict[str, float] = field(default_factory=dict)
    held_out: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    overfitting: str | None = None
    start: dict[str, float] = field(default_factory=dict)
    ended: str | None = None
    memory_bytes: int = 0
    predicted: dict[str, float] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    changes: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, log: list[dict[str, Any]], *, tokens: int, **figures: Any) -> "TrainResult":
        """With what the curve says. figures: the other attributes."""
        spent = sum(row["train_seconds"] for row in log)
        last = {name: log[-1][name] for name in ("loss", "bits_per_byte")}
        pace = tokens / max(spent, 1e-9)
        return cls(log=log, tokens=tokens, tokens_per_second=pace, metrics=last_metrics(log), **last, **figures)

    def figures(self) -> dict[str, Any]:
        """Everything but the curve and the folder, as JSON."""
        return {name: value for name, value in vars(self).items() if name not in ("out", "log")}

    def times(self) -> dict[str, Any]:
        """What a clock said: of the run, and at each entry of its curve."""
        curve = [{name: row[name] for name in ("step", *OF_TIME) if name in row} for row in self.log]
        measured = {name: getattr(self, name) for name in ("seconds", "tokens_per_second", "memory_bytes", "predicted")}
        return {**measured, "curve": curve}


def write_result(
    model: Transformer, objective: Objective, config: TrainConfig, folder: Path, result: TrainResult
) -> None:
    """The model, its tokenizer, the curve and the figures, into a folder that the caller commits."""
    lora.save(model, folder, dtype=getattr(torch, config.save_dtype))
    tokenizer = objective.tokenizer
    if tokenizer is not None:
        tokenizer.save(folder)
    if generation := generation_config(model, tokenizer):
        (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")
    timeless = [{name: value for name, value in row.items() if name not in OF_TIME} for row in result.log]
    write_curve(folder / "log.jsonl", timeless)
    (folder / TIMES).write_text(json.dumps(result.times(), indent=1) + "\n")
    figures = {name: value for name, value in result.figures().items() if name not in OF_MACHINE}
    facts: Mapping[str, Any] = {"config": asdict(config), **objective.describe(), **figures}
    (folder / "training.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def generation_config(model: Transformer, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The settings that the model came with, and all ids that end a reply, so that other tools stop there too."""
    known = model.generation.get("eos_token_id")
    ids = [] if known is None else known if isinstance(known, list) else [known]
    ends = list(dict.fromkeys([*(tokenizer.end_ids if tokenizer is not None else ()), *ids]))
    return {**model.generation, "eos_token_id": ends} if ends else dict(model.generation)


def last_metrics(log: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the objective's metrics over the last tenth of the curve."""
    tail = log[-max(1, len(log) // 10) :]
    return {name: sum(row["metrics"].get(name, 0.0) for row in tail) / len(tail) for name in tail[-1]["metrics"]}
