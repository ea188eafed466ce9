"""How much a run keeps beside the weights: the state of its optimizer, and copies of what is trained.

The one place where this is counted before there is an optimizer: on paper, for sharing a state out, for the room in
memory, for the room on disk. Leaves out: counts of steps, and the number for each row that `muon.by_neuron` keeps.
"""

from typing import Literal

from torch import nn

from lapis.model.lora import of
from lapis.training.config import TrainConfig
from lapis.training.optim.muon import hidden_matrices


def optimizer_size(kind: Literal["adamw", "muon", "sgd"], matrices: int, others: int) -> int:
    """What an optimizer keeps, in the unit of its arguments: numbers for numbers, bytes for bytes.

    Args:
        kind: AdamW keeps two moments, SGD and Muon a momentum; what Muon does not take is AdamW's.
        matrices: What is trained of the matrices inside blocks (`hidden_matrices`).
        others: The rest of what is trained.
    """
    return {"adamw": 2 * (matrices + others), "muon": matrices + 2 * others, "sgd": matrices + others}[kind]


def copied_size(config: TrainConfig, numbers: int, held: int) -> int:
    """Bytes of what is kept of what is trained: an average in float32, the best weights, the last within the limits.

    Args:
        config: Of the run.
        numbers: How many numbers are trained.
        held: Their bytes in the precision of the weights.
    """
    return (config.ema > 0) * 4 * numbers + (config.best + bool(config.limits)) * held


def copy_bytes(model: nn.Module, config: TrainConfig) -> int:
    """Of these copies of what a model trains."""
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return copied_size(config, numbers, trained_bytes(model))


def optimizer_bytes(model: nn.Module, kind: Literal["adamw", "muon", "sgd"]) -> int:
    """Of the optimizer of what a model trains, in the precision of its weights, which may be on the meta device."""
    matrices = sum(p.nbytes for p in hidden_matrices(model))
    return optimizer_size(kind, matrices, trained_bytes(model) - matrices)


def trained_bytes(model: nn.Module) -> int:
    """Of the weights that need a gradient."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def weight_bytes(model: nn.Module) -> int:
    """Of all weights, frozen ones included."""
    return sum(p.nbytes for p in model.parameters())


def checkpoint_bytes(model: nn.Module, config: TrainConfig) -> int:
    """Of a checkpoint on disk: the model, or its adapter; the optimizer, and copies."""
    return written_bytes(model) + optimizer_bytes(model, config.optimizer) + copy_bytes(model, config)


def written_bytes(model: nn.Module) -> int:
    """Of the folder that a run writes: the model, or its adapter."""
    return weight_bytes(model) if of(model) is None else trained_bytes(model)
