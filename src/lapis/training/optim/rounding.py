"""Weights in bfloat16 without a float32 master: updates are rounded at random, up or down, so that none is lost.

bfloat16 has 8 bits: an update of less than 1/256 of a weight would vanish every time. Rounded up with the probability
of the part that is cut off, it is right on average (Gupta et al. 2015, arXiv:1502.02551, section 3). Weights, gradients
and both moments take 8 bytes for each parameter in place of 16. Leaves out: float16, float8.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def round_into_(target: Tensor, value: Tensor, generator: torch.Generator | None = None) -> None:
    """bfloat16 `target` <- float32 `value`, each element rounded up or down at random, right on average."""
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = value.contiguous().view(torch.int32).add(noise).bitwise_and_(-(1 << 16))
    rounded = bits.view(torch.float32)
    target.copy_(torch.where(value.isfinite(), rounded, value))


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW on bfloat16 weights, its moments in bfloat16 as well; the arithmetic is float32 (torch's fused kernel)."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})
        self.seed = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    device = parameter.device
                    if device not in generators:
                        generators[device] = torch.Generator(device).manual_seed(self.seed)
                    self._update(parameter, group, generators[device])

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], generator: torch.Generator) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        weight, grad = parameter.float(), parameter.grad.float()
        first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()
        state["step"] += 1
        torch._fused_adamw_(
            [weight], [grad], [first], [second], [], [state["step"]], lr=group["lr"], beta1=group["betas"][0],
            beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
            maximize=False,
        )  # fmt: skip
        for target, value in ((parameter, weight), (state["exp_avg"], first), (state["exp_avg_sq"], second)):
            round_into_(target, value, generator)
