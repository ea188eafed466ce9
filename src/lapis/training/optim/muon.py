"""Muon: momentum for matrices, with the update made orthogonal (Jordan et al. 2024).

What is no hidden matrix goes to AdamW (optimizers.py). Later steps of the field can be asked for (`MuonOptions`): other
coefficients, updates of equal size for each neuron, a weight decay that never works against the update, or that falls.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lapis.training.config import MuonOptions
from lapis.training.distributed.pieces import own, piece_like, whole
from lapis.training.optim.rounding import round_into_

# the quintic of Jordan et al., "Muon" (kellerjordan.github.io/posts/muon): steepest at 0 while it stays near 1
_ROUNDS = 5
_JORDAN = [(3.4445, -4.7750, 2.0315)] * _ROUNDS
# each round the best one after those before it, for singular values from 1e-3 on (Amsel et al. 2025, arXiv:2505.16932,
# algorithm 1, with its margin of a fiftieth for rounding)
_POLAR = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
_MARGIN = 1.02  # that a matrix is smaller than 1 by
_AT_ONCE = 1 << 26  # numbers in the matrices that are made orthogonal together
_NEURON_DECAY = 0.95  # of the running mean of squares of a neuron's updates


class Muon(torch.optim.Optimizer):
    """Momentum, then an update that is made orthogonal by five Newton-Schulz rounds in bfloat16 (`exact`: float32).

    As torch.optim.Muon with `match_rms_adamw` (Liu et al. 2025, "Muon is scalable", equation 4: the update has the
    size of an AdamW update, so that one learning rate serves both), but matrices of one shape are made orthogonal
    together: at the size of the tour that takes 0.6x the time. Where a process holds a piece of each matrix, updates
    are gathered, some matrices at a time, and made orthogonal in every process, which keeps its piece.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95,
        options: MuonOptions | None = None,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.options = options or MuonOptions()
        self.seed = 0  # of the rounding of bfloat16 weights
        self.share = 1.0  # of the peak rate that this step has, by which a falling decay is smaller once more
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
            for (short, long), all_alike in alike.items():
                each = max(1, _AT_ONCE // (short * long))
                for first in range(0, len(all_alike), each):
                    parameters = all_alike[first : first + each]
                    orthogonal = self._orthogonal(parameters, momentum)
                    rate, decay = 0.2 * lr * math.sqrt(long), lr * group["weight_decay"]
                    decay *= self.share if self.options.falling else 1.0
                    for parameter, update in zip(parameters, orthogonal, strict=True):
                        turned = update if parameter.shape[0] <= parameter.shape[1] else update.T
                        if self.options.by_neuron:
                            turned = self._evened(parameter, turned)
                        mine = own(piece_like(turned, parameter))
                        if parameter.dtype == torch.bfloat16:
                            generator = generator or torch.Generator(parameter.device).manual_seed(self.seed)
                            moved = self._shrunk(parameter.float(), mine, decay).add_(mine, alpha=-rate)
                            round_into_(parameter, moved, generator)
                        else:
                            self._shrunk(own(parameter), mine, decay).add_(mine, alpha=-rate)

    def _orthogonal(self, parameters: list[Tensor], momentum: float) -> Tensor:
        """The updates of matrices of one shape, lying; whole ones, in every process."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [self._buffer(parameter) for parameter in parameters]
        torch._foreach_lerp_([own(b) for b in buffers], [own(g) for g in gradients], 1 - momentum)
        kind = torch.float32 if self.exact else torch.bfloat16
        updates = [whole(update.to(kind)) for update in torch._foreach_lerp(gradients, buffers, momentum)]
        stacked = torch.stack([u if u.shape[0] <= u.shape[1] else u.T for u in updates])
        del updates
        orthogonal = orthogonalize(stacked, self.options.coefficients)
        return orthogonal.to(torch.promote_types(parameters[0].dtype, torch.float32))

    def _shrunk(self, weights: Tensor, update: Tensor, decay: float) -> Tensor:
        """Weight decay, in place. Cautious: only where the update makes a weight smaller, too (Chen et al. 2025,
        arXiv:2510.12402, algorithm 1)."""
        if not self.options.cautious:
            return weights.mul_(1 - decay)
        return weights.sub_(weights * (weights * update > 0), alpha=decay)

    def _evened(self, parameter: Tensor, update_OI: Tensor) -> Tensor:
        """Each row over the root of the running mean of its squares; the whole as large as before (NorMuon: Li et al.
        2025, arXiv:2510.05491, algorithm 1)."""
        state, squares_O1 = self.state[parameter], update_OI.square().mean(1, keepdim=True)
        if "neuron_squares" not in state:
            state["neuron_squares"] = torch.zeros_like(squares_O1)
        state["neuron_squares"].lerp_(squares_O1, 1 - _NEURON_DECAY)
        evened: Tensor = update_OI / state["neuron_squares"].sqrt().add(1e-8)
        return evened.mul_(math.sqrt(min(update_OI.shape)) / evened.norm().clamp(min=1e-7))  # 0 where nothing moves

    def _buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonalize(stack_NSL: Tensor, coefficients: str = "jordan") -> Tensor:
    """The nearest matrices with orthonormal rows, roughly.

    Args:
        stack_NSL: N matrices of S rows and L columns, S <= L, any float dtype.
        coefficients: "jordan": singular values land in about [0.7, 1.2]; "polar": in about [0.9, 1.1].

    Returns:
        N matrices of the same dtype.
    """
    polar = coefficients == "polar"
    size = stack_NSL.norm(dim=(-2, -1), keepdim=True) * (_MARGIN if polar else 1.0)
    x: Tensor = stack_NSL / size.clamp(min=1e-7)
    for a, b, c in _POLAR if polar else _JORDAN:
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


def orthogonalize_flops(short: int, long: int) -> int:
    """Of `orthogonalize` for one matrix of so many rows and columns."""
    return _ROUNDS * (4 * short * short * long + 2 * short**3)


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The matrices inside the blocks, which Muon is for: no embedding, no output head, no vector."""
    edge = {p for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    edge |= {p for name, p in model.named_parameters() if name.split(".")[0] in ("head", "lm_head", "embed")}
    return {p for p in model.parameters() if p.ndim == 2 and p.requires_grad and p not in edge}
