"""ModernBERT's block: the usual one, but for the first, whose attention reads what was normed after the embedding."""

from torch import nn

from lapis.families.config import ModelConfig
from lapis.model.blocks.standard import Architecture, TransformerBlock


class ModernBertBlock(TransformerBlock):
    """x + attention(norm(x)), then the same with the MLP; the first layer's norm is the embedding's."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        if layer == 0:
            self.norm.add_module("attn", nn.Identity())


ARCHITECTURE = Architecture(ModernBertBlock)
