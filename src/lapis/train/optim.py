"""Optimizers and schedules: AdamW, Muon (with AdamW for what is no hidden matrix), and the learning rate of a step.

A schedule is a pure function of the step, so it has no state to save. Leaves out: SGD, other shapes of schedule.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

# the quintic of Jordan et al., "Muon" (kellerjordan.github.io/posts/muon): steepest at 0 while it stays near 1
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5


@dataclass
class Schedule:
    """Warm-up, stable, decay (WSD; Hu et al. 2024, MiniCPM, section 4).

    The learning rate rises to its peak over `warmup` steps, stays, and falls in a line to `floor` of the peak over the
    last `decay` steps. total is None while a run that is bounded by time does not know its length: the stable part
    needs none.
    """

    warmup: int
    decay: int
    total: int | None
    floor: float = 0.0

    def scale(self, step: int) -> float:
        """The factor on the peak learning rate for step 0, 1, ..."""
        up = min(1.0, (step + 1) / (self.warmup + 1))
        if self.total is None or self.decay == 0:
            return up
        left = min(1.0, max(0.0, (self.total - step) / (self.decay + 1)))
        return min(up, self.floor + (1 - self.floor) * left)


class Muon(torch.optim.Optimizer):
    """Muon: momentum, then the update is made orthogonal by five Newton-Schulz rounds in bfloat16.

    As torch.optim.Muon with `match_rms_adamw` (Liu et al. 2025, "Muon is scalable", equation 4: the update has the
    size of an AdamW update, so that one learning rate serves both), but matrices of one shape are made orthogonal
    together: at the size of the tour that takes 0.6x the time.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[tuple(sorted(parameter.shape))].append(parameter)
            for (_, long), parameters in alike.items():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                buffers = [self._buffer(parameter) for parameter in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - momentum)
                updates = torch._foreach_lerp(gradients, buffers, momentum)
                stacked = torch.stack([(u if u.shape[0] <= u.shape[1] else u.T).bfloat16() for u in updates])
                orthogonal = orthogonalize(stacked).to(parameters[0].dtype)
                torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
                rate = 0.2 * lr * math.sqrt(long)
                for parameter, update in zip(parameters, orthogonal, strict=True):
                    parameter.add_(update if parameter.shape[0] <= parameter.shape[1] else update.T, alpha=-rate)

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonalize(stack_NSL: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows, roughly: singular values land in about [0.7, 1.2].

    stack_NSL: N matrices of S rows and L columns, S <= L, any float dtype; returned in the same.
    """
    x: Tensor = stack_NSL / stack_NSL.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.baddbmm(x, poly, x, beta=_A)
    return x


class Optimizers:
    """One or two optimizers that act as one; state is named by the parameter, not by a number."""

    def __init__(self, model: nn.Module, kind: Literal["adamw", "muon"], lr: float, weight_decay: float) -> None:
        self.lr = lr
        self.names: dict[Tensor, str] = {
            parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [p for p in self.parameters if p.ndim >= 2]
        vectors = [p for p in self.parameters if p.ndim < 2]
        hidden = hidden_matrices(model) if kind == "muon" else set()
        groups = [
            {"params": [p for p in matrices if p not in hidden], "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},  # norms and biases have nothing to shrink towards
        ]
        groups = [group for group in groups if group["params"]]
        self.parts: list[torch.optim.Optimizer] = []
        if groups:
            self.parts.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True))
        if hidden:
            self.parts.append(Muon([p for p in matrices if p in hidden], lr, weight_decay))

    def step(self, scale: float) -> None:
        """One update at `scale` times the peak learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * scale
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


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The matrices inside the blocks, which Muon is for: no embedding, no output head, no vector."""
    edge = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    edge |= {p for name, p in model.named_parameters() if name.split(".")[0] in ("head", "lm_head", "embed")}
    return {p for p in model.parameters() if p.ndim == 2 and p.requires_grad and p not in edge}
