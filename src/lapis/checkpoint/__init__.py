"""A model folder or a hub id in, named tensors out; and the one way in which anything is written."""

from lapis.checkpoint.opening import open_checkpoint
from lapis.checkpoint.store import Checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
