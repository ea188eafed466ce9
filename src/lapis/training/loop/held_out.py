"""Held-out evaluation while a model trains: when to stop early, and which weights were best.

The metrics are the objective's (`evaluate`); this file has them measured without a trace in the run, and compares them.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lapis.config import nearest
from lapis.errors import ConfigError, TrainingError
from lapis.parsing import quoted
from lapis.training.config import TrainConfig
from lapis.training.distributed.parallel import Processes
from lapis.training.loop.progress import Watch, live, show_share
from lapis.training.loop.state import Best, TrainState
from lapis.training.loop.stop_request import StopRequest
from lapis.training.objectives.objective import Objective
from lapis.wording import format_count

_SHARE = 0.05  # of an evaluation, from which the time of a whole one is known
RISE = 1.01  # over the lowest held-out loss, from which a run counts as over-fitting
LESS_IS_BETTER = ("loss", "nll", "perplexity", "error", "bits", "kl")


class _Enough(Exception):
    """So much of an evaluation is done that its time is known."""


class Evaluator:
    """Evaluates a run on the objective's held-out data. All know the result; the first process computes it, or all of
    them alike where each holds a piece of the weights.

    Attributes:
        latest: Metrics of the last evaluation within the run.
        seconds: That an evaluation takes; 0 in a process that computes none, and while none is known.
    """

    def __init__(
        self, state: TrainState, config: TrainConfig, world: Processes, watch: Watch, request: StopRequest
    ) -> None:  # fmt: skip
        self.state, self.config, self.world, self.watch, self.request = state, config, world, watch, request
        self._last: tuple[dict[str, Tensor], str, bool] | None = None  # as the last step left it
        self._warned = False
        self.seconds = 0.0
        self.latest: dict[str, float] = {}

    @property
    def objective(self) -> Objective:
        return self.state.objective

    @property
    def _takes_part(self) -> bool:
        return self.world.leads or self.state.sharding is not None

    def metrics(self) -> dict[str, float]:
        """The held-out metrics of the weights as they are; empty where nothing is held out.

        A stop is obeyed here, where nothing of the run changes, and not while the outcome is noted.
        """
        metrics: dict[str, float] = {}
        if self._takes_part:
            started = time.monotonic()
            metrics = self._evaluate(show_share(self.watch, "evaluating held-out data", self.seconds))
            self.seconds = time.monotonic() - started
        return dict(self.world.from_lead(metrics))

    def _evaluate(self, heard: Callable[[int, int], None]) -> dict[str, float]:
        self.objective.heard = heard
        try:
            with self.world.connected(), untouched(self.state), torch.no_grad(), self.state.gathered():
                with self.request.at_once():
                    return {name: float(value) for name, value in self.objective.evaluate(self.state.model).items()}
        finally:
            self.state.settle()

    def measure(self) -> None:
        """Notes how long an evaluation takes, where none was yet, by the first twentieth of one; asks no process."""
        if self.seconds or not self._takes_part:
            return
        show, share, started = show_share(self.watch, "measuring an evaluation"), 1.0, time.monotonic()

        def hear(done: int, total: int) -> None:
            nonlocal share
            show(done, total)
            if done >= max(1.0, _SHARE * total):
                share = done / total
                raise _Enough

        with suppress(_Enough):
            if not self._evaluate(hear):
                return
        self.seconds = (time.monotonic() - started) / share

    def begin(self) -> None:
        """Measures the start, from which limits count; nothing where there are none, or where it is known.

        Raises:
            TrainingError: Where the objective has no held-out data.
            ConfigError: For a limit of what is not measured.
        """
        state = self.state
        if not self.config.limits or state.start:
            return
        state.start = self._required()
        for name in self.config.limits:
            if name not in state.start:
                raise ConfigError(f"train: limits: {quoted(name)} is not measured; {nearest(name, state.start)}")
        self._note(state.start)
        if beyond := self._beyond(state.start):
            self.watch.note(f"train: {beyond} from the start; the run ends when it has come within and leaves again")
        else:
            self._keep_within()

    @property
    def is_due(self) -> bool:
        """Whether one comes before the next step."""
        state, every = self.state, self.config.eval_every
        row = state.log[-1] if state.log else {}
        done = row.get("step") == state.step and "held_out" in row  # before the checkpoint that the run goes on from
        due = bool(every and state.step and state.step % every == 0) and state.step != state.schedule.total
        return due and not done

    def step(self) -> tuple[dict[str, float], bool]:
        """One evaluation within the run.

        Returns:
            The metrics, and whether the run should stop: the watched one has not improved for long, or one is beyond
            its limit. `state.ended` says which.

        Raises:
            TrainingError: Where the objective has no held-out data.
            ConfigError: Where the metric to watch is not among the metrics.
        """
        state, config = self.state, self.config
        with state.average.in_place():
            metrics = self._required()
            self._note(metrics)
            if self._left(metrics):
                return metrics, True
            if config.limits and not self._beyond(metrics):
                self._keep_within()
            name = watched_metric(metrics, config.watch_metric)
            update_best(state.best, state.step, name, metrics[name], state.model, config.best and self._takes_part)
        self._warn_of_overfitting(metrics)
        if config.early_stop and state.best.stale >= config.early_stop:
            best = f"best at step {state.best.step} ({state.best.value:.4g})"
            none = f"no number in {format_count(state.best.stale, 'evaluation')}"
            state.ended = f"{name} was {none if state.best.step is None else best}; stopped early"
            self.watch.note(f"train: {state.ended}")
        return metrics, bool(state.ended)

    def result(self) -> dict[str, float]:
        """Gives the model the weights that the run ends with, and measures these.

        They are the best ones, where that was asked for; after the limits were left those of the last evaluation
        within; else the last ones, or their average. `put_back` undoes it.
        """
        state = self.state
        others = bool(state.average.tensors or state.best.weights or state.within.weights)
        alone = self.world.size == 1  # several processes are not stopped from here on
        self._last = trained_weights(state.model) if others and alone else {}, state.ended, state.left
        if state.left:
            put_weights(state.model, state.within.weights)
        elif self.config.best and state.best.weights:
            put_weights(state.model, state.best.weights)
        else:
            state.average.put()
        metrics = self.metrics()
        if not state.left and self._left(metrics):  # by the last steps
            put_weights(state.model, state.within.weights)
            metrics = self.metrics()
        return metrics

    def put_back(self) -> None:
        """Gives the model the weights of the last step again, for a run that is stopped at its end and may go on."""
        if self._last is not None:
            weights, self.state.ended, self.state.left = self._last
            put_weights(self.state.model, weights)

    def _left(self, metrics: Mapping[str, float]) -> bool:
        """Whether a metric is beyond its limit now and none was at an earlier evaluation; notes why the run ends."""
        state, beyond = self.state, self._beyond(metrics)
        if not beyond or state.within.step is None:
            return False
        of = f"of step {state.within.step:,}" if state.within.step else "before the first step"
        state.left, state.ended = True, f"{beyond}; the run ends with the weights {of}, the last within"
        self.watch.note(f"train: {state.ended}")
        return True

    def _beyond(self, metrics: Mapping[str, float]) -> str:
        """Half a sentence about a metric that is beyond its limit; "" where none is. A NaN is."""
        for name, limit in self.config.limits.items():
            bound, over = limit, ""
            if isinstance(limit, str):
                share = float(limit.rstrip(" %")) / 100
                bound = self.state.start[name] * (1 + share if less_is_better(name) else 1 - share)
                over = f", {limit} from {self.state.start[name]:.4g} at the start"
            if not (metrics[name] == bound or better(name, metrics[name], float(bound))):
                return f"{name} is {metrics[name]:.4g}, beyond its limit of {bound:.4g}{over}"
        return ""

    def _keep_within(self) -> None:
        state = self.state
        weights = trained_weights(state.model) if self._takes_part else {}
        state.within = Best(state.step, weights=weights)

    def _required(self) -> dict[str, float]:
        metrics = self.metrics()
        if not metrics:
            raise TrainingError("train: eval_every is set, but the objective has no held-out data; give it some")
        return metrics

    def _note(self, metrics: Mapping[str, float]) -> None:
        self.latest = dict(metrics)
        live(self.watch).evaluated(self.state.step, metrics)
        text = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        self.watch.note(f"  step {self.state.step}: held-out {text}")

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
        with untouched(self.state), self.request.at_once():
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
    losses = [(row["step"], row.get("held_out", {}).get("valid_loss", math.nan)) for row in log]
    points = [(step, loss) for step, loss in losses if math.isfinite(loss)]
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
    return value < than if less_is_better(name) else value > than


def less_is_better(name: str) -> bool:
    """Whether a metric is a loss of some kind, by its name behind the last slash."""
    return any(word in name.split("/")[-1].lower().replace("_", " ").split() for word in LESS_IS_BETTER)


def update_best(best: Best, step: int, name: str, value: float, model: nn.Module, keep: bool) -> None:
    """Notes an evaluation in `best`; with `keep`, with a copy of the trained weights where it is the best one. What is
    no number never is."""
    if not math.isnan(value) and (best.step is None or better(name, value, best.value)):
        best.step, best.value, best.stale = step, value, 0
        if keep:
            best.weights = trained_weights(model)
    else:
        best.stale += 1


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what is trained."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Gives parameters these values."""
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)
