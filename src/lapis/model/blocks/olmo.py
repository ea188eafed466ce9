"""OLMo 2's block: a norm after each half, before the sum, and none before it.

Shapes: B batch, T time, D model dim.
"""

from torch import Tensor, nn

from lapis.families.config import ModelConfig
from lapis.model.blocks.attention import Shared
from lapis.model.blocks.norm import make_norm
from lapis.model.blocks.standard import Architecture, TransformerBlock
from lapis.model.cache import Cache


class NormedAfterBlock(TransformerBlock):
    """x + norm(attention(x)), then the same with the MLP (OLMo Team 2024, arXiv:2501.00656, section 3)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, make_norm, ("attn_out", "mlp_out"))

    @property
    def added(self) -> tuple[nn.Module, nn.Module]:
        return self.norm.attn_out, self.norm.mlp_out

    def forward(self, x_BTD: Tensor, shared: Shared, cache: Cache | None = None) -> Tensor:
        x_BTD = x_BTD + self._dropped(self.norm.attn_out(self.attn(x_BTD, shared, cache)))
        return x_BTD + self._dropped(self.norm.mlp_out(self.mlp(x_BTD)))


ARCHITECTURE = Architecture(NormedAfterBlock)
