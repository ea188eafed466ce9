"""Tensors of which each process holds a piece (DTensor), and whole ones, by the same calls.

torch.distributed.tensor takes as long to import as half of torch; a run that shares nothing out never needs it.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lapis.training.distributed.forward import waiting


def is_piece(tensor: Tensor) -> bool:
    """Whether this process holds only a piece of the tensor."""
    pieces = sys.modules.get("torch.distributed.tensor")
    return pieces is not None and isinstance(tensor, pieces.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor from all pieces; every process must call this. One that is whole is returned as it is."""
    if not is_piece(tensor):
        return tensor
    piece: Any = tensor
    with waiting():
        joined: Tensor = piece.full_tensor()
    return joined


def piece_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process' piece of a whole tensor, cut as `like` is; without communication."""
    if not is_piece(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    other: Any = like
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def own(tensor: Tensor) -> Tensor:
    """The numbers that this process holds, as a plain tensor that shares their memory."""
    if not is_piece(tensor):
        return tensor
    piece: Any = tensor
    local: Tensor = piece.to_local()
    return local


def total_norm(gradients: Sequence[Tensor]) -> float:
    """The 2-norm of all gradients together; every process must call this where one of them is a piece."""
    plain = [gradient for gradient in gradients if not is_piece(gradient)]
    pieces = [gradient for gradient in gradients if is_piece(gradient)]
    parts = [torch.nn.utils.get_total_norm(some) for some in (plain, pieces) if some]
    return math.hypot(*(whole(part).item() for part in parts))


def scale(gradients: Sequence[Tensor], factor: float) -> None:
    """Multiplies all, in place."""
    torch._foreach_mul_([own(gradient) for gradient in gradients], factor)
