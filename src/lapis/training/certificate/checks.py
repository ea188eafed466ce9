"""What ought not to matter, tried on the very model that a run has trained: a step in parts, packed rows, a checkpoint.

Three things that training takes for granted are computed both ways on a few rows of the run's own data, at the cost of
about ten small batches and one checkpoint. Nothing of the run is another afterwards: weights, optimizer, random
generators and the place in the data are put back from that checkpoint, and compared.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from shutil import disk_usage, rmtree
from typing import Any

import torch
from torch import Tensor

from lapis.errors import OutputError, TrainingError
from lapis.training.config import TrainConfig
from lapis.training.loop.held_out import untouched
from lapis.training.loop.state import TrainState, restore, save
from lapis.training.objectives.objective import SMALL_BATCH, FirstRows
from lapis.training.optim.footprint import trained_bytes, weight_bytes, written_bytes
from lapis.training.setup.blocks import autocast
from lapis.training.setup.probe import available
from lapis.wording import format_count

LEAST_STEPS = 50  # of a run that is checked without being asked to be
MOST_BYTES = 2 << 30  # of a checkpoint that is written for this
STEPS = 2  # that are done before and after it
ROWS = 4  # of the batch that is computed whole and in parts, at most
SHARED = "weights are shared out over processes, and checks are of a run that holds them whole"
_EQUAL = {"float32": 1e-4, "bf16": 5e-2}  # of relative differences: what the order of sums may make


@dataclass(frozen=True)
class Check:
    """One thing computed in two ways.

    Attributes:
        name: What was compared.
        how: In what way, as a sentence.
        difference: Relative; 0 is the same bytes. None where it was not computed.
        limit: Up to which it counts as the same.
        why_not: Why it was not computed; "" where it was.
    """

    name: str
    how: str
    difference: float | None = None
    limit: float = 0.0
    why_not: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether both ways gave the same; None where it was not computed."""
        return None if self.difference is None else self.difference <= self.limit

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def why_unchecked(state: TrainState, config: TrainConfig, processes: int) -> str:
    """Why a run that has done its steps is not checked, as half a sentence; "" where it is.

    It is where that was asked for, and by itself where it is long enough that the cost is small.
    """
    if config.certify == "off":
        return "certify is off"
    if state.sharding is not None:
        return SHARED
    if config.certify == "auto" and processes > 1:
        return f"the run has {processes} processes, and by themselves those of one are checked"
    if config.certify == "auto" and state.step < LEAST_STEPS:
        steps = format_count(state.step, "step")
        return f"the run has {steps}, and by themselves those of {LEAST_STEPS} or more are checked"
    return ""


def run_checks(state: TrainState, config: TrainConfig, precision: str, folder: Path) -> list[Check]:
    """The checks of a run that has done its steps.

    Args:
        state: Of the run; as it was, afterwards.
        config: Of the run.
        precision: In which its steps were computed.
        folder: Where a checkpoint is written and removed.

    Raises:
        TrainingError: Where a checkpoint does not give back what was saved, so that this run could not be gone on with.
    """
    model, limit = state.model, _EQUAL[precision]
    checker = _Checker(state, precision)
    with untouched(state):
        checks = [checker.accumulated(limit), checker.packed(limit)]
        state.optimizers.clear()
        groups = state.optimizers.tensors(), state.average.tensors, state.best.weights, state.within.weights
        beside = sum(tensor.nbytes for group in groups for tensor in group.values())
        size, written, free = weight_bytes(model) + beside, written_bytes(model) + beside, disk_usage(folder).free
        name, how = (
            "saved and restored",
            f"{STEPS} more steps from the state and from its checkpoint, all bytes",
        )
        if not state.objective.compiles:
            checks.append(Check(name, how, why_not="replies would be drawn for it"))
        elif size > MOST_BYTES:
            checks.append(Check(name, how, why_not=f"a checkpoint has {size / 1e9:.1f} GB"))
        elif lack := _lack(state, size):
            checks.append(Check(name, how, why_not=f"a checkpoint has {lack}"))
        elif written > free:
            text = f"{written / 1e9:.2f} GB, and {free / 1e9:.2f} GB of the disk are free"
            checks.append(Check(name, how, why_not=f"a checkpoint has {text}"))
        elif reason := checker.unsaved(folder / "checked"):
            checks.append(Check(name, how, why_not=f"a checkpoint could not be written: {reason}"))
        else:
            checks.append(Check(name, how, checker.restored(folder / "checked")))
    return checks


class _Checker:
    """Computes losses and gradients of rows of a run."""

    def __init__(self, state: TrainState, precision: str) -> None:
        self.state, self.precision, self.objective = state, precision, state.objective
        fitting = int(2 * SMALL_BATCH / max(1.0, self.objective.tokens_per_row))
        self.rows = min(state.rows, max(2, min(ROWS, fitting)))

    def accumulated(self, limit: float) -> Check:
        """The gradient of some rows at once, and row by row."""
        name, how = "accumulated or not", f"the gradient of {self.rows} rows at once, and one by one"
        if not self.objective.separable:
            return Check(name, how, why_not="the loss of a batch is more than the sum over its rows")
        if self.rows < 2:
            return Check(name, how, why_not="a micro-batch has one row")
        if lack := _lack(self.state, 2 * trained_bytes(self.state.model)):
            return Check(name, how, why_not=f"two gradients have {lack}")
        whole = self._gradient(self._batches(self.rows, 1))
        parts = self._gradient(self._batches(1, self.rows))
        apart = torch.stack([_norm(a.float() - b.float()) for a, b in zip(whole, parts, strict=True)]).norm()
        size = torch.stack([_norm(a) for a in whole]).norm()
        return Check(name, how, (apart / size.clamp(min=1e-150)).item(), limit)

    def packed(self, limit: float) -> Check:
        """The loss of a row that holds several texts, and of each of these by itself."""
        name, how = "packed or not", "the loss of a row of several texts, and of each text by itself"
        if not self.objective.separable:
            return Check(name, how, why_not="its rows are no packed texts")
        with torch.no_grad():
            for batch, _ in zip(self.objective.batches(FirstRows(1, self.state.seed)), range(8), strict=False):
                row = self.objective.prepare(self.state.model, batch[0])
                texts = self.objective.apart(row)
                if len(texts) > 1:
                    (one, count), (other, counted) = self._loss([row]), self._loss(texts)
                    if count != counted:
                        return Check(name, f"{how}: {count} and {counted} targets", math.inf, limit)
                    return Check(name, f"{how} ({len(texts)} of them)", abs(one - other) / max(abs(one), 1e-150), limit)
        return Check(name, how, why_not="no row that was looked at holds several texts")

    def unsaved(self, folder: Path) -> str:
        """Writes a checkpoint; why that could not be done, "" where it was."""
        try:
            save(self.state, folder, {}, None)
        except (OutputError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            return getattr(cause, "strerror", None) or str(error)
        return ""

    def restored(self, folder: Path) -> float:
        """0 where steps from a checkpoint give the bytes of steps without one, 1 where they do not. Removes it."""
        state, before = self.state, self._digest()
        try:
            self._steps()
            expected = self._digest()
            restore(state, folder)
            if self._digest() != before:
                raise TrainingError("train: a checkpoint does not give back what was saved; nothing was written")
            self._steps()
            result = self._digest()
            restore(state, folder)
        finally:
            rmtree(folder, ignore_errors=True)
        return float(result != expected)

    def _batches(self, rows: int, count: int) -> list[Any]:
        stream = self.objective.batches(FirstRows(rows, self.state.seed))
        return [next(stream)[0] for _ in range(count)]

    def _loss(self, batches: Iterable[Any]) -> tuple[float, int]:
        total, count = 0.0, 0
        for batch in batches:
            with autocast(self.state.device, self.precision):
                loss, supervised, _ = self.objective.loss(self.state.model, batch)
            total, count = total + loss.item(), count + supervised
        return total, count

    def _backward(self, batches: Sequence[Any]) -> int:
        """Adds the gradients of batches up; returns what they are to be divided by."""
        count = 0
        for batch in batches:
            with autocast(self.state.device, self.precision):
                with torch.no_grad():
                    batch = self.objective.prepare(self.state.model, batch)
                loss, supervised, _ = self.objective.loss(self.state.model, batch)
            if supervised:
                loss.backward()  # type: ignore[no-untyped-call]
            count += supervised
        return max(1, count)

    def _gradient(self, batches: Sequence[Any]) -> list[Tensor]:
        """Of each trained parameter."""
        parameters, count = self.state.optimizers.parameters, self._backward(batches)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.div_(count) for p in parameters]
        self.state.optimizers.clear()
        return gradients

    def _steps(self) -> None:
        """Some updates at the peak rate, on the first rows."""
        state = self.state
        for number, batch in enumerate(self._batches(1, STEPS)):
            count = self._backward([batch])
            for parameter in state.optimizers.parameters:
                if parameter.grad is not None:
                    parameter.grad /= count
            state.optimizers.step(1.0, state.step + number)
            state.optimizers.clear()

    def _digest(self) -> str:
        """sha256 of the weights and of the optimizer."""
        digest = hashlib.sha256()
        tensors = {**self.state.model.state_dict(), **self.state.optimizers.tensors()}
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def _lack(state: TrainState, needed: int) -> str:
    """So many bytes and those that are free, where these are fewer: no run is to end for its certificate's sake."""
    free = available(state.device)
    return f"{needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB of memory are free" if free < needed else ""


def _norm(tensor: Tensor) -> Tensor:
    """Of all entries, summed in float64."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float64)
    return norm
