"""Cohere's model: the usual block, and logits that are divided in the last norm, for the reason that Granite's are.

Shapes: D model dim.
"""

from torch import Tensor

from lapis.families.config import ModelConfig
from lapis.model.blocks.norm import LayerNorm
from lapis.model.blocks.standard import Architecture


class DividedLayerNorm(LayerNorm):
    """LayerNorm without a bias, whose result is divided by a number."""

    def __init__(self, config: ModelConfig, dim: int) -> None:
        super().__init__(dim, config.norm_eps, bias=False)
        self.divisor = config.logit_divisor if config.head == "lm" else 1.0

    @property
    def gain(self) -> Tensor:
        """What the normed values are multiplied by, [D]."""
        return self.weight.float() / self.divisor

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.divisor


ARCHITECTURE = Architecture(norm=DividedLayerNorm)
