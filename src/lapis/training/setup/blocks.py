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

from lapis.errors import ConfigError, TrainingError
from lapis.model.transformer import Transformer
from lapis.training.distributed.forward import step_forward
from lapis.training.objectives.objective import Objective

Recompute = Literal["none", "selective", "whole"]
_COMPILER = ("torch._dynamo", "torch._inductor")  # whose errors differ between versions of torch


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a loss is computed: matrix products in bfloat16 for "bf16"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def set_dtype(model: Transformer, weights: str) -> str:
    """Gives weights the type that they are trained in; returns a line where what is trained had a smaller one, else "".

    weights: "bf16", or "float32" for what is trained.
    """
    if weights == "bf16":
        model.bfloat16()
        return ""
    trained = [p for p in model.parameters() if p.requires_grad]
    small = {p.dtype for p in trained} - {torch.float32, torch.float64}
    if not small:
        return ""
    for parameter in trained:  # small updates would be lost in the rounding of such weights
        parameter.data = parameter.data.float()
    return f"train: {', '.join(sorted(map(str, small)))} weights are trained as float32"


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


def check_compiles(model: Transformer, objective: Objective, mode: str) -> None:
    """Raises ConfigError where compile is "on" and the blocks cannot run compiled; "auto" leaves them as they are."""
    experts = "" if model.config.experts is None else "the shapes in its experts follow the tokens"
    why = experts if objective.compiles else "replies grow token by token"
    if mode == "on" and why:
        what = f"a {model.config.family} model" if why == experts else objective.name
        raise ConfigError(
            f"train: compile is on, and {what} cannot run compiled: {why}; leave compile out, or give compile: off"
        )


@contextmanager
def compiled(model: Transformer, on: bool) -> Iterator[None]:
    """While inside, the blocks run compiled; those with experts do not, since the shapes in them follow the tokens.

    Raises TrainingError where the compiler fails.
    """
    blocks = list(model.blocks) if on and model.config.experts is None else []
    before = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        setattr(block, "forward", torch.compile(block.forward))  # noqa: B010
    try:
        yield
    except Exception as error:
        if not blocks or not any(kind.__module__.startswith(_COMPILER) for kind in type(error).__mro__):
            raise
        raise compiler_failed(error) from None
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                setattr(block, "forward", forward)  # noqa: B010


def compiler_failed(error: Exception) -> TrainingError:
    """The line for what a compiler raises."""
    lines = [line for line in str(error).strip().splitlines() if not line.endswith("raised:")]
    reason = (lines or [type(error).__name__])[0][:120]
    return TrainingError(f"train: torch.compile failed ({reason}); set compile to off")
