"""GLM-4's block: Gemma's, with a norm before and after each half, in plain RMSNorms.

Shapes: B batch, T time, D model dim.
"""

from lapis.families.config import ModelConfig
from lapis.model.blocks.gemma3 import SandwichBlock
from lapis.model.blocks.norm import make_norm
from lapis.model.blocks.standard import Architecture


class PlainSandwichBlock(SandwichBlock):
    """x + norm(attention(norm(x))), then the same with the MLP."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, make_norm)


ARCHITECTURE = Architecture(PlainSandwichBlock)
