"""A config in, the block of its family out: attention, MLP and norms, and a file for each kind of block.

A family names the file of its block (`Family.block`); nothing else knows of it.
"""

from importlib import import_module

from lapis.families import ModelConfig, family_of
from lapis.model.blocks.standard import Architecture


def architecture_of(config: ModelConfig) -> Architecture:
    """What a model of this shape is built from. Only the file that its family names is imported."""
    architecture: Architecture = import_module(f"{__name__}.{family_of(config).block}").ARCHITECTURE
    return architecture
