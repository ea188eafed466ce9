"""The model of a folder to be read out: our own where lapis runs its family, transformers' for any other causal one."""

import torch

from lapis.checkpoint import Checkpoint
from lapis.model.check import read_config
from lapis.model.load import load
from lapis.model.reading.opening import load_outside, read_outline
from lapis.model.reading.readable import Outline, ReadableModel


def outline_of(checkpoint: Checkpoint) -> Outline:
    """The shape of a folder's model, before a weight is read.

    Args:
        checkpoint: Opened.

    Raises:
        LapisError: As `load_readable`.
    """
    return read_outline(checkpoint) if checkpoint.runs is None else read_config(checkpoint)


def load_readable(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> ReadableModel:
    """The model of a folder, in evaluating mode.

    Args:
        checkpoint: Opened.
        dtype: Of the weights in memory; by default that of the folder.
        device: Where the weights go.

    Raises:
        CheckpointError: The folder is damaged, or neither lapis nor transformers runs its model.
        MissingExtra: It needs transformers, which is not installed.
    """
    if checkpoint.runs is None:
        return load_outside(checkpoint, dtype, device)
    return load(checkpoint, dtype, device)
