"""RMSNorm and LayerNorm, with statistics in float32.

Under autocast a norm that feeds projections gives the lower dtype at once, so that they need not each cast it; one that
stands on the residual stream (BERT's) keeps the stream's dtype. Leaves out: BatchNorm, norms without weights.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lapis.families.config import ModelConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    starts: ClassVar = {"weight": 1.0}  # the weight that changes nothing

    def __init__(self, dim: int, eps: float, on_stream: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), self.starts["weight"]))
        self.eps, self.on_stream = eps, on_stream

    @property
    def gain(self) -> Tensor:
        """What the normed values are multiplied by, [dim]."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype if self.on_stream else compute_dtype(x)
        if x.dtype in (torch.float32, torch.bfloat16) and x.requires_grad and x.device.type == "cpu":
            out: Tensor = _TrainedRMSNorm.apply(x, self.gain, self.eps, dtype)  # type: ignore[no-untyped-call]
            return out
        gain = self.gain
        wide = torch.promote_types(x.dtype, gain.dtype)  # they differ under autocast
        return F.rms_norm(x.to(wide), gain.shape, gain.to(wide), self.eps).to(dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016, arXiv:1607.06450), or without the bias."""

    starts: ClassVar = {"weight": 1.0}
    bias: nn.Parameter | None

    def __init__(self, dim: int, eps: float, on_stream: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)) if bias else None)
        self.eps, self.on_stream = eps, on_stream

    def forward(self, x: Tensor) -> Tensor:
        out = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        return out if self.on_stream else out.to(compute_dtype(x))


class _TrainedRMSNorm(torch.autograd.Function):
    """RMSNorm with a backward pass of few kernels; torch's own has no fused one on the CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (norm * norm / x.shape[-1] + eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        out: Tensor = (x * inverse).mul_(weight).to(dtype)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        dim, grad = x.shape[-1], grads[0]
        normed = x * inverse
        product = (grad * normed).reshape(-1, dim)  # heads that nothing rotates come transposed
        mean = torch.mv(product, weight.to(product.dtype)).view(inverse.shape).div_(dim)
        grad_x = torch.addcmul(grad * weight, normed, mean, value=-1).mul_(inverse)
        return grad_x.to(x.dtype), product.sum(0).to(weight.dtype), None, None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the next linear layer computes in: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


Norm = RMSNorm | LayerNorm


def make_norm(config: ModelConfig, dim: int) -> Norm:
    """The norm of a config, over `dim` numbers."""
    on_stream = config.norm_place == "post"
    if config.norm == "rms":
        return RMSNorm(dim, config.norm_eps, on_stream)
    return LayerNorm(dim, config.norm_eps, on_stream, config.norm_bias)
