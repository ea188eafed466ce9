"""What a run can do where memory lacks: a run in, parts of a sentence out. What it does already is not among them."""

from collections.abc import Sequence

from torch import nn

from lapis.model import lora
from lapis.training.config import TrainConfig


def for_a_step(config: TrainConfig, rows: int) -> list[str]:
    """What makes the activations of a micro-batch of so many rows smaller."""
    ways = []
    if rows > 1:
        ways.append("raise accumulate (the result is the same)")
    if config.checkpointing != "whole":
        ways.append("set checkpointing to whole (the same result, a third slower)")
    return [*ways, smaller_rows(rows)]


def smaller_rows(rows: int) -> str:
    """What makes less of so many rows."""
    return "lower batch or context" if rows > 1 else "lower context"


def for_the_state(config: TrainConfig, model: nn.Module) -> list[str]:
    """What makes weights, gradients and optimizer smaller."""
    adapted, ways = lora.of(model), list[str]()
    full = config.weights == "float32" and (adapted is None or adapted.config.base == "float32")
    if adapted is None:
        whole = all(parameter.requires_grad for parameter in model.parameters())
        ways += ["freeze a part" if whole else "freeze more", "train a LoRA (which needs model)"]
    elif full and not adapted.originals:
        ways.append("hold the base in bfloat16 (lora.base)")
    if full and config.optimizer != "sgd" and config.shard in ("auto", "none"):  # others refuse such weights
        ways.append("set weights to bf16")
    return ways


def either(ways: Sequence[str]) -> str:
    """One, "one, or two", "one, two, or three"."""
    return ", or ".join(filter(None, (", ".join(ways[:-1]), *ways[-1:])))
