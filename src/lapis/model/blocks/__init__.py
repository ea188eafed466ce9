"""A config in, the block of its family out. A file for each kind of block; a family names the file (`Family.block`)."""

from importlib import import_module

from lapis.families import ModelConfig, family_of
from lapis.model.blocks.standard import Architecture


def architecture_of(config: ModelConfig) -> Architecture:
    """What a model of this shape is built from. Only the file that its family names is imported."""
    architecture: Architecture = import_module(f"{__name__}.{family_of(config).block}").ARCHITECTURE
    return architecture
