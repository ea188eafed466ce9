"""Activation checkpointing: a block keeps its input only, and computes the rest again in the backward pass.

Chen et al. 2016 (arXiv:1604.06174). "whole" does it in every block (about a third more time), "selective" in every
second one. The result is the same to the bit. Leaves out: choosing single operations, keeping activations on another
device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint

from lapis.model.transformer import Transformer

Recompute = Literal["none", "selective", "whole"]


@contextmanager
def recomputed(model: Transformer, kind: Recompute) -> Iterator[None]:
    """While inside, blocks that compute gradients keep less. The model's code knows nothing of it."""
    chosen = {"none": [], "selective": list(model.blocks)[1::2], "whole": list(model.blocks)}[kind]
    for block in chosen:
        setattr(block, "forward", _again(block.forward))  # noqa: B010  (a method that is put aside, on purpose)
    try:
        yield
    finally:
        for block in chosen:
            del block.forward


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)

    return run
