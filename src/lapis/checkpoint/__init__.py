"""A model directory as named tensors: open, read, and the one way to write."""

from lapis.checkpoint.store import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
