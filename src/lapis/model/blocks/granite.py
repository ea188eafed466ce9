"""Granite's block: embeddings and what each half adds are multiplied, and logits are divided.

The divisor is in the last norm. The head is linear and has no bias, so the logits are the same, and whatever reads a
hidden state through norm and head (a lens, a loss in parts) is right without knowing of it.

Shapes: B batch, T time, D model dim.
"""

from torch import Tensor, nn

from lapis.families.config import ModelConfig
from lapis.model.blocks.attention import Shared
from lapis.model.blocks.norm import RMSNorm
from lapis.model.blocks.standard import Architecture, TransformerBlock
from lapis.model.cache import Cache


class DividedRMSNorm(RMSNorm):
    """RMSNorm whose result is divided by a number; weight / divisor is a float32 and never rounded."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__(dim, config.norm_eps)
        self.divisor = config.logit_divisor if config.head == "lm" else 1.0

    @property
    def gain(self) -> Tensor:
        return self.weight.float() / self.divisor


class ResidualScale(nn.Module):
    """x times a number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class ScaledBlock(TransformerBlock):
    """x + s attention(norm(x)), then the same with the MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.attn_scale, self.mlp_scale = ResidualScale(config.residual_scale), ResidualScale(config.residual_scale)

    @property
    def added(self) -> tuple[nn.Module, nn.Module]:
        return self.attn_scale, self.mlp_scale

    def forward(self, x_BTD: Tensor, shared: Shared, cache: Cache | None = None) -> Tensor:
        x_BTD = x_BTD + self._dropped(self.attn_scale(self.attn(self.norm.attn(x_BTD), shared, cache)))
        return x_BTD + self._dropped(self.mlp_scale(self.mlp(self.norm.mlp(x_BTD))))


ARCHITECTURE = Architecture(ScaledBlock, DividedRMSNorm, lambda config: config.embed_scale or 1.0)
