"""Held-out figures while training: when to stop early, and which weights were best.

The figures are the objective's (`evaluate`); this file compares them. Leaves out: what a figure means.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from lapis.config import nearest
from lapis.errors import ConfigError

LESS_IS_BETTER = ("loss", "nll", "perplexity", "error", "bits", "kl")


@dataclass
class Best:
    """The best evaluation so far. value: the watched figure. stale: evaluations since. weights: if kept."""

    step: int | None = None
    value: float = 0.0
    stale: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def numbers(self) -> dict[str, float | int | None]:
        """All but the weights, as JSON."""
        return {"step": self.step, "value": self.value, "stale": self.stale}


def watched(figures: Mapping[str, float], name: str) -> str:
    """The figure that early stop and best look at: `name`, or the first. Raises ConfigError where there is none."""
    if not name and figures:
        return next(iter(figures))
    if name not in figures:
        raise ConfigError(f'train: watch_metric is "{name}"; {nearest(name, figures)}')
    return name


def better(name: str, value: float, than: float) -> bool:
    """Whether a figure improved; a NaN never does."""
    less = any(word in name.split("/")[-1].lower().replace("_", " ").split() for word in LESS_IS_BETTER)
    return value < than if less else value > than


def judge(best: Best, step: int, name: str, value: float, model: nn.Module, keep: bool) -> None:
    """Takes an evaluation into `best`; with `keep`, a copy of the trained weights where it is the best one."""
    if best.step is None or better(name, value, best.value):
        best.step, best.value, best.stale = step, value, 0
        if keep:
            best.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    else:
        best.stale += 1
