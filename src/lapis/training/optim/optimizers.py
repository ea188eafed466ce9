"""What turns gradients into weights: optimizers with named state, the learning rate of a step, an average of weights.

AdamW, Muon (with AdamW for what is no hidden matrix) and SGD, with a rate for each part (rates.py). Rows of single
tokens that are trained alone have an AdamW of their own (rows.py). Leaves out: an optimizer for each part.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lapis.errors import ConfigError
from lapis.model.lora import TokenRows
from lapis.training.config import MuonOptions, Shape, TrainConfig
from lapis.training.optim.muon import Muon, hidden_matrices
from lapis.training.optim.rounding import RoundedAdamW
from lapis.training.optim.rows import RowsAdamW

FITTED_AFTER = 3  # steps, from which a run that is bounded by time knows how fast they are


class Optimizers:
    """One or two optimizers that act as one; state is named by the parameter, not by a number.

    Args:
        model: What is trained: its parameters that need a gradient.
        kind: "muon" takes the matrices inside blocks and leaves the rest to AdamW.
        lr: Peak learning rate.
        weight_decay: Of matrices.
        seed: Of the random rounding of bfloat16 weights (rounding.py). SGD has no such rounding.
        extra: A module that the objective trains beside the model.
        rates: Peak learning rates by parameter, where they differ from lr (rates.py).
        muon: Variants of Muon's update.
    """

    def __init__(
        self, model: nn.Module, kind: Literal["adamw", "muon", "sgd"], lr: float, weight_decay: float, seed: int = 0,
        extra: nn.Module | None = None, rates: Mapping[str, float] | None = None, muon: MuonOptions | None = None,
    ) -> None:  # fmt: skip
        self.lr, self.seed = lr, seed
        beside = [] if extra is None else [(f"objective.{name}", p) for name, p in extra.named_parameters()]
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in [*model.named_parameters(), *beside] if parameter.requires_grad
        }
        self.parameters: list[nn.Parameter] = list(self.names)  # type: ignore[arg-type]
        matrices = [p for p in self.parameters if p.ndim >= 2]
        vectors = [p for p in self.parameters if p.ndim < 2]
        hidden = hidden_matrices(model) if kind == "muon" else set()
        rows_alone = [] if kind == "sgd" else [each for each in model.modules() if isinstance(each, TokenRows)]
        alone: set[Tensor] = {each.rows for each in rows_alone}
        features: dict[Tensor, Tensor] = {
            each.rows: each.features_NF for each in rows_alone if each.features_NF is not None
        }
        peak_of = {parameter: (rates or {}).get(name, lr) for parameter, name in self.names.items()}
        peaks = list(dict.fromkeys(peak_of.values()))
        groups = [
            {
                "params": [p for p in params if p not in hidden | alone and peak_of[p] == peak],
                "weight_decay": decay,
                "peak": peak,
            }
            for params, decay in ((matrices, weight_decay), (vectors, 0.0))  # norms and biases do not shrink
            for peak in peaks
        ]
        groups = [group for group in groups if group["params"]]
        self.parts: list[torch.optim.Optimizer] = []
        rounded = any(p.dtype == torch.bfloat16 for p in self.parameters)
        if groups and kind == "sgd":
            if rounded:
                raise ConfigError("train: sgd does not round weights in bf16; use adamw or muon, or weights: float32")
            self.parts.append(torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True))
        elif groups and rounded:
            self.parts.append(RoundedAdamW(groups, lr))
        elif groups:
            self.parts.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True))
        for peak in peaks:
            if rows := [p for p in matrices if p in alone and peak_of[p] == peak]:
                self.parts.append(RowsAdamW([{"params": rows, "peak": peak}], lr, features))
            if mine := [p for p in matrices if p in hidden and peak_of[p] == peak]:
                self.parts.append(Muon(mine, lr, weight_decay, options=muon))
                self.parts[-1].param_groups[0]["peak"] = peak

    def set_precision(self, precision: str) -> None:
        """Muon orthogonalizes in bfloat16 where the rest of the step is in bfloat16, too."""
        for part in self.parts:
            if isinstance(part, Muon):
                part.exact = precision == "float32"

    def step(self, scale: float, step: int = 0) -> None:
        """Update number `step` at `scale` times the peak learning rate."""
        for part in self.parts:
            if isinstance(part, (RoundedAdamW, Muon)):
                part.seed = self.seed * 1_000_003 + step  # so that every process rounds alike
            if isinstance(part, Muon):
                part.share = scale
            for group in part.param_groups:
                group["lr"] = group["peak"] * scale
            part.step()

    def clear(self) -> None:
        """Drops the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state as `parameter name/what` -> tensor."""
        return {
            f"{self.names[parameter]}/{key}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`. A parameter that had no gradient yet has no state."""
        held: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            parameter, _, key = name.rpartition("/")
            held[parameter][key] = value
        for part in self.parts:
            part.state.clear()
            for group in part.param_groups:
                for parameter in group["params"]:
                    if self.names[parameter] in held:
                        # AdamW's step counts live on the CPU or with the parameter, as torch keeps them
                        part.state[parameter] = {
                            key: value.to(parameter.device) for key, value in held[self.names[parameter]].items()
                        }


@dataclass
class Schedule:
    """The learning rate of a step, as a pure function, so that it has no state to save.

    Args:
        warmup: Steps over which the rate rises to its peak.
        decay: Steps at the end over which "wsd" falls.
        total: Steps of the run; None while a run that is bounded by time does not know it.
        floor: Share of the peak that the rate falls to.
        kind: "wsd": stays at the peak, then falls in a line over the last `decay` steps (warm-up, stable, decay: Hu et
            al. 2024, MiniCPM, section 4). "linear": falls in a line from the warm-up on. "cosine": falls as half a wave
            (Loshchilov and Hutter 2016). "constant": stays.
    """

    warmup: int
    decay: int
    total: int | None
    floor: float = 0.0
    kind: Shape = "wsd"

    @property
    def needs_total(self) -> bool:
        """Whether the shape depends on the length from the warm-up on."""
        return self.kind in ("cosine", "linear")

    @classmethod
    def of(cls, config: TrainConfig, rows: int) -> "Schedule":
        """The schedule of a run. rows: of one epoch."""
        if config.minutes is not None:
            return cls(config.warmup, 0, None, kind=config.schedule)
        steps = config.steps or max(1, math.ceil((config.epochs or 0) * rows / config.batch))
        return cls(min(config.warmup, steps // 10), round(config.decay * steps), steps, kind=config.schedule)

    def fit_budget(self, config: TrainConfig, step: int, seconds: float, pace: float) -> None:
        """With a budget of time: fixes the warm-up after three steps, and the length where the decay must begin.

        From then on the run is a run of so many steps, and goes on exactly as such. A shape that depends on the length
        from the start gets it after three steps, so that its end is an estimate.

        Args:
            config: With `minutes`.
            step: Steps done.
            seconds: Spent so far.
            pace: Seconds of a step, with its share of what comes between steps.
        """
        budget = (config.minutes or 0.0) * 60
        if step == FITTED_AFTER:
            self.warmup = min(config.warmup, int(budget / pace / 10))
        tail = config.decay if config.schedule == "wsd" else 0.0
        if seconds + pace > budget * (1 - tail) or (step >= FITTED_AFTER and self.needs_total):
            left = max(0, int((budget - seconds) / pace))
            self.decay, self.total = left, step + left

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


class Average:
    """A running average of the weights, which is often better than the last of them (Polyak and Juditsky 1992):
    average <- decay * average + (1 - decay) * weights after each step, in float32, of what is trained.

    The decay starts at 1/10 and rises to `decay`, so that the random beginning is soon forgotten. With decay 0 there is
    no average, and the methods do nothing.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad} if decay else {}
        self.tensors: dict[str, Tensor] = {n: p.detach().float().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after update number `step` (1, 2, ...)."""
        if not self.decay:
            return
        share = 1 - min(self.decay, step / (step + 9))
        for name, parameter in self.parameters.items():
            self.tensors[name].lerp_(parameter.float(), share)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Goes on from saved tensors."""
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While inside, the model has the average's weights."""
        own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.put()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(own[name])

    @torch.no_grad()
    def put(self) -> None:
        """The model gets the average's weights, to keep."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.tensors[name])
