"""AdamW for rows of single tokens: a row moves as far as its token was met, in place of all rows alike.

A row that scores a token gets a gradient from every place, also where its token is not: a small one, always away from
what was read. AdamW divides by the size of the gradient, so that rows of rare tokens would move as fast as those of
frequent ones, and be pushed down between one time and the next. Here the step of a row is scaled by the typical size
of its gradient over that of all rows, where that is below 1. One row alone moves as AdamW would have it.

Shapes: N rows, D model dim.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class RowsAdamW(torch.optim.Optimizer):
    """AdamW without weight decay; parameters are [N, D]."""

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for rows_ND in group["params"]:
                if rows_ND.grad is not None:
                    self._update(rows_ND, rows_ND.grad, group)

    def _update(self, rows_ND: Tensor, grad_ND: Tensor, group: dict[str, Any]) -> None:
        state = self.state[rows_ND]
        if not state:
            state["step"] = torch.zeros((), device=rows_ND.device)
            state["exp_avg"] = torch.zeros_like(rows_ND)
            state["exp_avg_sq"] = torch.zeros_like(rows_ND)
        state["step"] += 1
        first, second = group["betas"]
        state["exp_avg"].lerp_(grad_ND, 1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(grad_ND, grad_ND, value=1 - second)
        step = float(state["step"])
        mean_ND = state["exp_avg"] / (1 - first**step)
        square_ND = state["exp_avg_sq"] / (1 - second**step)
        of_row_N1 = square_ND.mean(1, keepdim=True)
        met_N1 = (of_row_N1 / of_row_N1.mean().clamp_min(1e-30)).sqrt().clamp_max(1.0)
        rows_ND.sub_(group["lr"] * met_N1 * mean_ND / (square_ND.sqrt() + group["eps"]))
