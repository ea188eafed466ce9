"""One update of the weights: micro-batches, the sum of their losses over all processes, one division, one clip.

The loss of a step is divided once, by the count of what is supervised in all of its micro-batches, so that neither
accumulation nor the number of processes changes it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lapis.errors import LapisError, TrainingError
from lapis.training.config import TrainConfig
from lapis.training.distributed.parallel import Processes, StepLeft
from lapis.training.distributed.pieces import is_piece, total_norm
from lapis.training.distributed.pieces import scale as scale_gradients
from lapis.training.loop.guards import Fault
from lapis.training.loop.progress import LiveWatch, Silent, format_time
from lapis.training.loop.state import TrainState, rng_state, set_rng_state
from lapis.training.loop.stop_request import StopRequest, StopSignal
from lapis.training.objectives.balance import balance_loss, coefficient, watched_choices
from lapis.training.objectives.objective import Objective
from lapis.training.optim.dither import Dither, hold_bfloat16, multiplied
from lapis.training.setup.blocks import autocast
from lapis.training.setup.remedies import either, for_a_step, for_the_state

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
        drawn: Loss per count and place in the data of each micro-batch of this process, as a guard names it.
    """

    loss: float = 0.0
    count: int = 0
    parts: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    norm: float = 0.0
    cursor: dict[str, Any] | None = None
    without_gradient: set[int] = field(default_factory=set)
    drawn: list[tuple[float, Any, dict[str, Any]]] = field(default_factory=list)

    def add(self, loss: float, count: int, parts: int, metrics: dict[str, float]) -> None:
        self.loss, self.count, self.parts = self.loss + loss, self.count + count, self.parts + parts
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value


class Updater:
    """Computes gradients and hands them to the optimizers.

    Attributes:
        precision: Of the forward pass.
        watch: Hears how far a long step is.
    """

    precision = "float32"
    watch: LiveWatch = Silent()
    _dither = Dither()

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

    def needs_dither(self) -> bool:
        """Whether the weights that the run starts from lie on bfloat16 numbers, so that small updates would be lost."""
        return hold_bfloat16(multiplied(self.state.model))

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Before the first step. facts: of the run, which say how it computes."""
        self.precision = str(facts["precision"])
        self.state.optimizers.set_precision(self.precision)
        if self.precision == "bf16" and facts.get("dither"):
            self._dither = Dither(multiplied(self.state.model))

    def update(self, batches: Batches, scale: float, last_good: Callable[[], str]) -> StepSums | None:
        """One update at `scale` times the peak learning rate; None where a stop was requested before it was whole.

        Raises TrainingError for a step at which a guard stops the run, or where nothing is supervised.
        """
        rng, skipped = rng_state(self.state.device), list[dict[str, Any]]()
        optimizers, clip, guard = self.state.optimizers, self.config.clip, self.state.guard
        while (sums := self._gather(batches)) is not None:
            if sums.count == 0:
                raise TrainingError(
                    f"train: no token of step {self.state.step + 1} is supervised; look at the rows with: lapis data "
                    "show"
                )
            self.world.add_up(self._whole, sums.without_gradient)
            gradients = [p.grad for p in optimizers.parameters if p.grad is not None]
            with self.world.connected():
                sums.norm = total_norm(gradients) / sums.count
            fault = guard.fault(sums.loss / sums.count, sums.norm)
            if fault is None or self._goes_on(fault, sums, skipped, last_good):
                break
            optimizers.clear()
        if sums is None:  # as if the step had not begun
            optimizers.clear()
            set_rng_state(rng, self.state.device)
            return None
        guard.take(sums.loss / sums.count, sums.norm, skipped)
        clipped = min(1.0, clip / (sums.norm + 1e-6)) if clip else 1.0
        scale_gradients(gradients, clipped / sums.count)  # the one division, over all micro-batches
        with self.world.connected():
            optimizers.step(scale, self.state.step)
        optimizers.clear()
        return sums

    @property
    def _whole(self) -> list[nn.Parameter]:
        """What every process holds all of; gradients of pieces are summed as they come (distributed/sharding.py)."""
        return [p for p in self.state.optimizers.parameters if not is_piece(p)]

    def _goes_on(
        self, fault: Fault, sums: StepSums, skipped: list[dict[str, Any]], last_good: Callable[[], str]
    ) -> bool:  # fmt: skip
        """Whether the step is done all the same; False where its batch is left out, which `skipped` then says.

        Raises TrainingError where the run stops.
        """
        step, most = self.state.step + 1, self.config.guards.most
        where = "; ".join(filter(None, self.world.gather(self._culprits(fault, sums))))
        if fault.act == "stop" or len(skipped) == most:
            why = f" after {most} batches in a row that were left out" if fault.act == "skip" else ""
            error = TrainingError(
                f"train: {fault.what} at step {step}{why}; {last_good()}. The batch: {where}. Lower lr (now "
                f"{self.config.lr:g}), look at the data, or set guards to leave such batches out"
            )
            self.world.raise_once([True] * self.world.size, error)  # all see the same sums, one says so
        done = "it is left out" if fault.act == "skip" else f"it is learned from all the same; {last_good()}"
        self.state.objective.notes.append(f"{fault.what} at step {step}. The batch: {where}; {done}")
        if fault.act == "skip":
            skipped.append({"step": step, "what": fault.what, "batch": where})
        return fault.act == "warn"

    def _culprits(self, fault: Fault, sums: StepSums) -> str:
        """Which of this process's data are named: micro-batches without a finite loss, else the one with the largest;
        for a gradient all of the step."""
        parts = sums.drawn
        if fault.of == "loss":
            worst = max((loss for loss, _, _ in parts if math.isfinite(loss)), default=math.nan)
            broken = [part for part in parts if not math.isfinite(part[0])]
            parts = broken or [part for part in parts if part[0] == worst and math.isfinite(sums.loss)]
        return "; ".join(self.objective.name_batch(batch, cursor) for _, batch, cursor in parts)

    def _gather(self, batches: Batches) -> StepSums | None:
        """The shares of all processes, added up; None where one of them stops."""
        own, error = StepSums(), None
        try:
            with self._dither.applied(), self.request.at_once(), self.world.connected():
                self._compute(batches, own)
        except StopSignal:
            return None
        except StepLeft:
            pass  # the other says why
        except LapisError as raised:
            if self.world.size == 1 or self.state.sharding is not None:  # the others are within a block
                raise
            error = raised
        if self.world.size == 1:
            return None if own.cursor is None else own
        without = [i for i, p in enumerate(self._whole) if p.grad is None]
        share = {
            "sums": [own.loss, own.count, own.parts, own.metrics], "whole": own.cursor is not None,
            "stop": self.request.signal, "without": without, "failed": error is not None,
        }  # fmt: skip
        shares = self.world.gather_at_end(share)
        self.world.raise_once([each["failed"] for each in shares], error)
        self._stop = next((each["stop"] for each in shares if each["stop"]), None)
        if not all(each["whole"] for each in shares):
            return None
        total = StepSums(
            cursor=own.cursor, without_gradient=set.intersection(*(set(each["without"]) for each in shares)),
            drawn=own.drawn,
        )  # fmt: skip
        for each in shares:
            total.add(*each["sums"])
        return total

    def _compute(self, batches: Batches, own: StepSums) -> None:
        """The micro-batches of this process: gradients, and sums into `own`, whose cursor stays None after a stop."""
        cursor, start, parts, sharding = None, time.monotonic(), self.config.accumulate, self.state.sharding
        for number in range(parts * self.world.size):
            batch, cursor = next(batches)
            if number % self.world.size != self.world.rank:
                continue
            if self.request.signal and sharding is None:
                return
            if sharding is not None:
                sharding.begin_part(number // self.world.size == parts - 1)
            with out_of_memory_named(self.state, self.config):
                loss, count, metrics = self._loss(batch)
                own.add(0.0, 0, 0, metrics)
                if count:
                    own.add(loss.item(), count, 1, {})
                    own.drawn.append((loss.item() / count, batch, cursor))
                if sharding is not None or (count and math.isfinite(own.loss)):  # pieces need every process
                    loss.backward()  # type: ignore[no-untyped-call]
            done, seconds = number // self.world.size + 1, time.monotonic() - start
            if seconds > _LONG and done < parts:
                text = f"step {self.state.step + 1:,}: part {done} of {parts}"
                self.watch.stage(f"{text}, about {format_time(seconds / done * parts)} for a step")
        own.cursor = cursor

    def _loss(self, batch: Any) -> tuple[Tensor, int, dict[str, float]]:
        model = self.state.model
        with autocast(self.state.device, self.precision):
            with torch.no_grad(), self.state.gathered():
                batch = self.objective.prepare(model, batch)
            with watched_choices(model) as choices:
                loss, count, metrics = self.objective.loss(model, batch)
            if choices:
                uneven = balance_loss(choices)
                metrics = {**metrics, "balance": float(uneven.detach()) * count}
                loss = loss + coefficient(model) * uneven * count
        return loss, count, {name: float(value) for name, value in metrics.items()}


@contextmanager
def out_of_memory_named(state: TrainState, config: TrainConfig) -> Iterator[None]:
    """Out of memory as one line that names what helps."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            ways = [*for_a_step(config, state.rows), *for_the_state(config, state.model)]
            raise TrainingError(f"train: out of memory; {either(ways)}") from None
        raise
