"""How the blocks of a model run while it trains: in bfloat16, with less memory, or compiled.

Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): a block keeps its input only and computes the rest again
in the backward pass. "whole" does it in every block (about a third more time), "selective" in every second one; the
result is the same to the bit. torch.compile works block by block: all blocks share one graph, so compiling is short.
The head is not compiled (its loss runs in chunks, cross_entropy.py).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lapis.model.transformer import Transformer
from lapis.training.distributed.forward import step_forward

Recompute = Literal["none", "selective", "whole"]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a loss is computed: matrix products in bfloat16 for "bf16"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def recomputed(model: Transformer, kind: Recompute) -> Iterator[None]:
    """While inside, blocks that compute gradients keep less. The model's code knows nothing of it."""
    chosen = {"none": [], "selective": list(model.blocks)[1::2], "whole": list(model.blocks)}[kind]
    for block in chosen:
        setattr(block, "forward", _again(block.forward))  # noqa: B010  (hides the method, on purpose)
    try:
        yield
    finally:
        for block in chosen:
            del block.forward


class TooSlow(Exception):
    """A pass took longer than it may; see `stoppable`."""


@contextmanager
def stoppable(model: Transformer, seconds: float = math.inf) -> Iterator[None]:
    """While inside, Python runs after each block, in the backward pass too, and with it the handlers of signals.

    Raises TooSlow after the first block that ends later than `seconds` from now.
    """
    end = time.perf_counter() + seconds

    def check(gradient: Tensor | None = None) -> None:
        step_forward()
        if time.perf_counter() > end:
            raise TooSlow

    def after_block(block: nn.Module, inputs: Any, output: Any) -> None:
        check()
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(check)  # type: ignore[no-untyped-call]

    handles = [block.register_forward_hook(after_block) for block in model.blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        return checkpoint(forward, *args, use_reentrant=False)

    return run


@contextmanager
def compiled(model: Transformer, on: bool) -> Iterator[None]:
    """While inside, the blocks run compiled; those with experts do not, since the shapes in them follow the tokens."""
    blocks = list(model.blocks) if on and model.config.experts is None else []
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        setattr(block, "forward", torch.compile(block.forward))  # noqa: B010
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                setattr(block, "forward", forward)  # noqa: B010
