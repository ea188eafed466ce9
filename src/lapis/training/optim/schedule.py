"""The learning rate of a step: a pure function, so it has no state to save.

Leaves out: warm restarts, schedules per layer.
"""

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["wsd", "constant", "cosine", "linear"]


@dataclass
class Schedule:
    """A rise to the peak over `warmup` steps, then one of four shapes down to `floor` of the peak.

    wsd: stay, and fall in a line over the last `decay` steps (warm-up, stable, decay: Hu et al. 2024, MiniCPM,
    section 4). linear: fall in a line from the warm-up on. cosine: half a wave (Loshchilov and Hutter 2016). constant:
    stay. total is None while a run that is bounded by time does not know its length: a stable part needs none.
    """

    warmup: int
    decay: int
    total: int | None
    floor: float = 0.0
    kind: Kind = "wsd"

    @property
    def needs_total(self) -> bool:
        """Whether the shape depends on the length from the warm-up on."""
        return self.kind in ("cosine", "linear")

    def scale(self, step: int) -> float:
        """The factor on the peak learning rate for step 0, 1, ..."""
        up = min(1.0, (step + 1) / (self.warmup + 1))
        if self.total is None or self.kind == "constant":
            return up
        decay = self.decay if self.kind == "wsd" else self.total - self.warmup
        if decay <= 0:
            return up
        left = min(1.0, max(0.0, (self.total - step) / (decay + 1)))
        if self.kind == "cosine":
            left = 0.5 * (1 - math.cos(math.pi * left))
        return min(up, self.floor + (1 - self.floor) * left)
