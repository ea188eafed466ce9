"""Held-out evaluation while a model trains: when to stop early, and which weights were best.

The metrics are the objective's (`evaluate`); this file has them measured without a trace in the run, and compares them.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lapis.config import nearest
from lapis.errors import ConfigError, TrainingError
from lapis.training.config import TrainConfig
from lapis.training.distributed.parallel import Processes
from lapis.training.loop.progress import Watch, live, show_share
from lapis.training.loop.state import Best, TrainState
from lapis.training.objectives.objective import Objective

RISE = 1.01  # over the lowest held-out loss, from which a run counts as over-fitting
LESS_IS_BETTER = ("loss", "nll", "perplexity", "error", "bits", "kl")


class Evaluator:
    """Evaluates a run on the objective's held-out data. The first process computes; all know the result."""

    def __init__(self, state: TrainState, config: TrainConfig, world: Processes, watch: Watch) -> None:
        self.state, self.config, self.world, self.watch = state, config, world, watch
        self._warned = False
        self._seconds = 0.0  # of the last evaluation

    @property
    def objective(self) -> Objective:
        return self.state.objective

    def metrics(self) -> dict[str, float]:
        """The held-out metrics of the weights as they are; empty where nothing is held out."""
        metrics: dict[str, float] = {}
        if self.world.leads:
            started = time.monotonic()
            self.objective.heard = show_share(self.watch, "evaluating held-out data", self._seconds)
            with untouched(self.state), torch.no_grad():
                metrics = {name: float(value) for name, value in self.objective.evaluate(self.state.model).items()}
            self._seconds = time.monotonic() - started
        return dict(self.world.from_lead(metrics))

    def seconds_left(self) -> float:
        """Seconds of the evaluations to come, as long as the last one took; 0 where none was or no end is fixed."""
        total, every = self.state.schedule.total, self.config.eval_every
        if total is None or not every:
            return 0.0
        return self._seconds * (total // every - self.state.step // every + (total % every > 0))

    def step(self) -> tuple[dict[str, float], bool]:
        """One evaluation within the run.

        Returns:
            The metrics, and whether the watched one has not improved for so long that the run should stop.

        Raises:
            TrainingError: Where the objective has no held-out data.
            ConfigError: Where the metric to watch is not among the metrics.
        """
        state, config = self.state, self.config
        with state.average.in_place():
            metrics = self.metrics()
            if not metrics:
                raise TrainingError("train: eval_every is set, but the objective has no held-out data; give it some")
            name = watched_metric(metrics, config.watch_metric)
            update_best(state.best, state.step, name, metrics[name], state.model, config.best and self.world.leads)
        self._warn_of_overfitting(metrics)
        text = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        self.watch.note(f"  step {state.step}: held-out {text}")
        if config.early_stop and state.best.stale >= config.early_stop:
            self.watch.note(f"train: {name} was best at step {state.best.step} ({state.best.value:.4g}); stopped early")
            return metrics, True
        return metrics, False

    def _warn_of_overfitting(self, metrics: Mapping[str, float]) -> None:
        rows = [*self.state.log, {"step": self.state.step, "held_out": metrics}]
        sentence = overfitting(rows)
        if sentence and not self._warned:
            self._warned = True
            remedy = "" if self.config.best else "; best: true ends with the weights of that step"
            self.watch.note(f"train: {sentence}{remedy}")

    def sample(self) -> None:
        """Shows what the model writes now."""
        live(self.watch).stage("writing a sample")
        with untouched(self.state):
            text = self.objective.sample(self.state.model)
        text = " ".join(text.split())
        if text:
            self.watch.note(f"  step {self.state.step}: {text}")
            if self.state.log:
                self.state.log[-1]["sample"] = text  # the page shows it


def overfitting(log: Sequence[Mapping[str, Any]]) -> str | None:
    """A sentence where the held-out loss rose again while the run went on; None where it did not.

    log: rows of the learning curve, with `step` and where it was measured `held_out`.
    """
    points = [(row["step"], row["held_out"]["valid_loss"]) for row in log if "valid_loss" in row.get("held_out", {})]
    if len(points) < 2:
        return None
    step, lowest = min(points, key=lambda point: point[1])
    last = points[-1][1]
    if step == points[-1][0] or last <= RISE * lowest:
        return None
    return f"over-fitting: the held-out loss was lowest at step {step:,} ({lowest:.3f}) and rose to {last:.3f}"


@contextmanager
def untouched(state: TrainState) -> Iterator[None]:
    """While inside, there is no dropout; afterwards random generators are as they were."""
    state.model.eval()
    try:
        with torch.random.fork_rng(devices=[state.device] if state.device.type == "cuda" else []):
            yield
    finally:
        state.model.train()


def watched_metric(metrics: Mapping[str, float], name: str) -> str:
    """The metric that early_stop and best look at: `name`, or the first. Raises ConfigError for an unknown one."""
    if not name and metrics:
        return next(iter(metrics))
    if name not in metrics:
        raise ConfigError(f'train: watch_metric is "{name}"; {nearest(name, metrics)}')
    return name


def better(name: str, value: float, than: float) -> bool:
    """Whether a metric improved; a NaN never does."""
    less = any(word in name.split("/")[-1].lower().replace("_", " ").split() for word in LESS_IS_BETTER)
    return value < than if less else value > than


def update_best(best: Best, step: int, name: str, value: float, model: nn.Module, keep: bool) -> None:
    """Notes an evaluation in `best`; with `keep`, with a copy of the trained weights where it is the best one."""
    if best.step is None or better(name, value, best.value):
        best.step, best.value, best.stale = step, value, 0
        if keep:
            best.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    else:
        best.stale += 1
