"""One update of the weights: micro-batches, the sum of their losses over all processes, one division, one clip.

The loss of a step is divided once, by the count of what is supervised in all of its micro-batches, so that neither
accumulation nor the number of processes changes it.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lapis.errors import LapisError, TrainingError
from lapis.training.config import TrainConfig
from lapis.training.distributed.parallel import Processes
from lapis.training.loop.progress import LiveWatch, Silent, format_time
from lapis.training.loop.state import TrainState, rng_state, set_rng_state
from lapis.training.loop.stop_request import StopRequest, StopSignal
from lapis.training.objectives.objective import Objective
from lapis.training.setup.blocks import autocast

_LONG = 2.0  # seconds of a step, from which its parts are shown

Batches = Iterator[tuple[Any, dict[str, Any]]]


@dataclass
class StepSums:
    """What a step adds up to.

    Attributes:
        loss: Summed over `count`.
        count: What is supervised.
        parts: Micro-batches with loss.
        metrics: The objective's, summed over micro-batches.
        norm: Of the gradient, before the clip.
        cursor: After the step's data; None where the step is not whole.
        without_gradient: Numbers of parameters that no process has a gradient of.
    """

    loss: float = 0.0
    count: int = 0
    parts: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    cursor: dict[str, Any] | None = None
    without_gradient: set[int] = field(default_factory=set)

    def add(self, loss: float, count: int, parts: int, metrics: dict[str, float]) -> None:
        self.loss, self.count, self.parts = self.loss + loss, self.count + count, self.parts + parts
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value


class Updater:
    """Computes gradients and hands them to the optimizers.

    Attributes:
        precision: Of the forward pass, set before a step.
        watch: Hears how far a long step is.
    """

    precision = "float32"
    watch: LiveWatch = Silent()

    def __init__(
        self, state: TrainState, objective: Objective, config: TrainConfig, world: Processes, request: StopRequest
    ) -> None:
        self.state, self.objective, self.config, self.world = state, objective, config, world
        self.request = request
        self._stop: str | None = None

    @property
    def stop(self) -> str | None:
        """The signal for which all processes stop, or None."""
        return self.request.signal if self.world.size == 1 else self._stop

    def update(self, batches: Batches, scale: float, last_good: str) -> StepSums | None:
        """One update at `scale` times the peak learning rate; None where a stop was requested before it was whole.

        Raises TrainingError for a loss or gradient that is not finite, or where nothing is supervised.
        """
        rng = rng_state(self.state.device)
        sums = self._gather(batches, last_good)
        if sums is None:  # as if the step had not begun
            self.state.optimizers.clear()
            set_rng_state(rng, self.state.device)
            return None
        if sums.count == 0:
            raise TrainingError(
                f"train: no token of step {self.state.step + 1} is supervised; look at the rows with: lapis data show"
            )
        optimizers, clip = self.state.optimizers, self.config.clip
        self.world.add_up(optimizers.parameters, sums.without_gradient)
        gradients = [p.grad for p in optimizers.parameters if p.grad is not None]
        sums.norm = torch.nn.utils.get_total_norm(gradients).item() / sums.count
        self._require_finite(sums.norm, "norm of the gradient", last_good)
        clipped = min(1.0, clip / (sums.norm + 1e-6)) if clip else 1.0
        torch._foreach_mul_(gradients, clipped / sums.count)  # the one division, over all micro-batches
        optimizers.step(scale, self.state.step)
        optimizers.clear()
        return sums

    def _gather(self, batches: Batches, last_good: str) -> StepSums | None:
        """The shares of all processes, added up; None where one of them stops."""
        own, error = StepSums(), None
        try:
            with self.request.at_once():
                self._compute(batches, own, last_good)
        except StopSignal:
            return None
        except LapisError as raised:
            if self.world.size == 1:
                raise
            error = raised
        if self.world.size == 1:
            return None if own.cursor is None else own
        without = [i for i, p in enumerate(self.state.optimizers.parameters) if p.grad is None]
        share = {
            "sums": [own.loss, own.count, own.parts, own.metrics], "whole": own.cursor is not None,
            "stop": self.request.signal, "without": without, "failed": error is not None,
        }  # fmt: skip
        shares = self.world.gather(share)
        self.world.raise_once([each["failed"] for each in shares], error)
        self._stop = next((each["stop"] for each in shares if each["stop"]), None)
        if not all(each["whole"] for each in shares):
            return None
        total = StepSums(
            cursor=own.cursor, without_gradient=set.intersection(*(set(each["without"]) for each in shares))
        )
        for each in shares:
            total.add(*each["sums"])
        return total

    def _compute(self, batches: Batches, own: StepSums, last_good: str) -> None:
        """The micro-batches of this process: gradients, and sums into `own`, whose cursor stays None after a stop."""
        cursor, start, parts = None, time.monotonic(), self.config.accumulate
        for number in range(parts * self.world.size):
            batch, cursor = next(batches)
            if number % self.world.size != self.world.rank:
                continue
            if self.request.signal:
                return
            with out_of_memory_named():
                loss, count, metrics = self._loss(batch)
                own.add(0.0, 0, 0, metrics)
                if count:
                    own.add(loss.item(), count, 1, {})
                    self._require_finite(own.loss, "loss", last_good)
                    loss.backward()  # type: ignore[no-untyped-call]
            done, seconds = number // self.world.size + 1, time.monotonic() - start
            if seconds > _LONG and done < parts:
                text = f"step {self.state.step + 1:,}: part {done} of {parts}"
                self.watch.stage(f"{text}, about {format_time(seconds / done * parts)} for a step")
        own.cursor = cursor

    def _loss(self, batch: Any) -> tuple[Tensor, int, dict[str, float]]:
        model = self.state.model
        with autocast(self.state.device, self.precision):
            with torch.no_grad():
                batch = self.objective.prepare(model, batch)
            loss, count, metrics = self.objective.loss(model, batch)
        return loss, count, {name: float(value) for name, value in metrics.items()}

    def _require_finite(self, value: float, what: str, last_good: str) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"train: the {what} is {value} at step {self.state.step + 1}; {last_good}. "
                f"Lower lr (now {self.config.lr:g}) or look at the data"
            )


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """Out of memory as one line that names what helps."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise TrainingError(
                "train: out of memory; raise accumulate (the result is the same), set checkpointing to whole, lower "
                "batch or the context, or train a LoRA"
            ) from None
        raise
