"""Gemma 2's and 3's block: a norm before and after each half, norms that multiply by 1 + weight, scaled embeddings.

Shapes: B batch, T time, D model dim.
"""

from math import sqrt
from typing import ClassVar

from torch import Tensor, nn

from lapis.families.config import ModelConfig
from lapis.model.blocks.attention import Shared
from lapis.model.blocks.norm import RMSNorm
from lapis.model.blocks.standard import Architecture, MakeNorm, TransformerBlock
from lapis.model.cache import Cache


class OffsetRMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), where 1 + weight is a float32 and never rounded."""

    starts: ClassVar = {"weight": 0.0}

    @property
    def gain(self) -> Tensor:
        return 1.0 + self.weight.float()


def make_offset_norm(config: ModelConfig, dim: int) -> OffsetRMSNorm:
    """RMSNorm over `dim` numbers that multiplies by 1 + weight."""
    return OffsetRMSNorm(dim, config.norm_eps)


class SandwichBlock(TransformerBlock):
    """x + norm(attention(norm(x))), then the same with the MLP (Gemma Team 2025, arXiv:2503.19786, section 2).

    Args:
        config: Of the model.
        layer: Its number.
        norm: Makes a norm.
        more: Names of further norms that a block of this kind has.
        mlp: In place of the usual one.
    """

    def __init__(self, config: ModelConfig, layer: int, norm: MakeNorm = make_offset_norm,
                 more: tuple[str, ...] = (), mlp: nn.Module | None = None) -> None:  # fmt: skip
        super().__init__(config, layer, norm, ("attn", "attn_out", "mlp", "mlp_out", *more), mlp)

    @property
    def added(self) -> tuple[nn.Module, nn.Module]:
        return self.norm.attn_out, self.norm.mlp_out

    def forward(self, x_BTD: Tensor, shared: Shared, cache: Cache | None = None) -> Tensor:
        norm = self.norm
        x_BTD = x_BTD + self._dropped(norm.attn_out(self.attn(norm.attn(x_BTD), shared, cache)))
        return x_BTD + self._dropped(norm.mlp_out(self.fed(x_BTD)))

    def fed(self, x_BTD: Tensor) -> Tensor:
        """What the MLP says of the stream."""
        out_BTD: Tensor = self.mlp(self.norm.mlp(x_BTD))
        return out_BTD


ARCHITECTURE = Architecture(SandwichBlock, make_offset_norm, lambda config: sqrt(config.dim))
