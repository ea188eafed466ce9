"""A step that is not finite, or that jumps: whether it stops the run, is left out, or is only named.

A jump is a loss or a norm of the gradient so many standard deviations above the mean of the steps before it, as OLMo 2
counts spikes (OLMo team 2024, arXiv:2501.00656, section 3). A batch that is left out changes no weight, and the next
one takes its place in the step, as PaLM's runs went past theirs (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1).
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lapis.training.config import GuardOptions

LEAST = 20  # steps before a deviation is known
_FLAT = 0.01  # of the mean: a standard deviation counts as this at least, so that a flat curve has no spikes

Act = Literal["stop", "skip", "warn"]


@dataclass(frozen=True)
class Fault:
    """What is wrong with a step. what: half a sentence. act: what is done. of: where the culprit is looked for."""

    what: str
    act: Act
    of: Literal["loss", "norm"]


class StepGuard:
    """Watches the loss and the norm of the gradient.

    Attributes:
        skipped: The batches that were left out: step, what was wrong, and which of the data they were.
    """

    def __init__(self, options: GuardOptions) -> None:
        self.options = options
        self.skipped: list[dict[str, Any]] = []
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=options.window) for name in ("loss", "norm")}

    def fault(self, loss: float, norm: float) -> Fault | None:
        """Of a step with this loss per token and this norm of the gradient; None where nothing is wrong."""
        for of, name, value in (("loss", "loss", loss), ("norm", "norm of the gradient", norm)):
            if not math.isfinite(value):
                return Fault(f"the {name} is {value}", self.options.nan, of)  # type: ignore[arg-type]
        if self.options.spike == "off":
            return None
        for of, name, value in (("loss", "loss", loss), ("norm", "norm of the gradient", norm)):
            before = self._seen[of]
            if len(before) < LEAST:
                continue
            mean = statistics.fmean(before)
            deviation = max(statistics.pstdev(before), _FLAT * abs(mean))
            if value > mean + self.options.deviations * deviation:
                times = (value - mean) / deviation if deviation else math.inf
                what = f"the {name} is {value:.4g}, {times:.0f} standard deviations above {mean:.4g}"
                return Fault(what, self.options.spike, of)  # type: ignore[arg-type]
        return None

    def take(self, loss: float, norm: float, skipped: Sequence[Mapping[str, Any]] = ()) -> None:
        """Takes in a step that changed the weights, and what was left out before it."""
        self._seen["loss"].append(loss)
        self._seen["norm"].append(norm)
        self.skipped += [dict(entry) for entry in skipped]

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"skipped": self.skipped, **{name: list(values) for name, values in self._seen.items()}}

    def restore(self, numbers: Mapping[str, Any]) -> None:
        """The reverse of `to_json`."""
        self.skipped = list(numbers.get("skipped", ()))
        for name, values in self._seen.items():
            values.clear()
            values.extend(numbers.get(name, ()))
