"""Muon: momentum for matrices, with the update made orthogonal (Jordan et al. 2024).

What is no hidden matrix goes to AdamW (optimizers.py).
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lapis.training.distributed.pieces import own, piece_like, whole
from lapis.training.optim.rounding import round_into_

# the quintic of Jordan et al., "Muon" (kellerjordan.github.io/posts/muon): steepest at 0 while it stays near 1
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Momentum, then an update that is made orthogonal by five Newton-Schulz rounds in bfloat16 (`exact`: float32).

    As torch.optim.Muon with `match_rms_adamw` (Liu et al. 2025, "Muon is scalable", equation 4: the update has the
    size of an AdamW update, so that one learning rate serves both), but matrices of one shape are made orthogonal
    together: at the size of the tour that takes 0.6x the time. Where a process holds a piece of each matrix, updates
    are gathered and made orthogonal in every process, which keeps its piece.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.seed = 0  # of the rounding of bfloat16 weights
        self.exact = False  # orthogonalize in float32, so that sums in another order change next to nothing

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        generator: torch.Generator | None = None
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[tuple(sorted(parameter.shape))].append(parameter)
            for (_, long), parameters in alike.items():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                buffers = [self._buffer(parameter) for parameter in parameters]
                torch._foreach_lerp_([own(b) for b in buffers], [own(g) for g in gradients], 1 - momentum)
                updates = [whole(update) for update in torch._foreach_lerp(gradients, buffers, momentum)]
                kind = torch.float32 if self.exact else torch.bfloat16
                stacked = torch.stack([(u if u.shape[0] <= u.shape[1] else u.T).to(kind) for u in updates])
                orthogonal = orthogonalize(stacked).to(torch.promote_types(parameters[0].dtype, torch.float32))
                rate, shrink = 0.2 * lr * math.sqrt(long), 1 - lr * group["weight_decay"]
                for parameter, update in zip(parameters, orthogonal, strict=True):
                    turned = update if parameter.shape[0] <= parameter.shape[1] else update.T
                    if parameter.dtype == torch.bfloat16:
                        generator = generator or torch.Generator(parameter.device).manual_seed(self.seed)
                        round_into_(parameter, parameter.float().mul_(shrink).add_(turned, alpha=-rate), generator)
                    else:
                        own(parameter).mul_(shrink).add_(own(piece_like(turned, parameter)), alpha=-rate)

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


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The matrices inside the blocks, which Muon is for: no embedding, no output head, no vector."""
    edge = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    edge |= {p for name, p in model.named_parameters() if name.split(".")[0] in ("head", "lm_head", "embed")}
    return {p for p in model.parameters() if p.ndim == 2 and p.requires_grad and p not in edge}
