"""The little that an objective with rollouts must know of ranks: which parts of a step are its own, and sums over all.

With one process everything is its own and nothing is summed. Leaves out: sharding (parallel.py).
"""

import torch
import torch.distributed as dist
from torch import Tensor


def mine(parts: int) -> list[int]:
    """The micro-batches of a step that this process computes: rank, rank + world, ..."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(range(parts))
    return list(range(dist.get_rank(), parts, dist.get_world_size()))


def added(sums: Tensor) -> Tensor:
    """The tensor, summed over all processes; every process must call this, with the same shape."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sums = sums.clone()
        dist.all_reduce(sums)
    return sums


def gathered(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every process's tensors, in the order of ranks; every process must call this."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [tensors]
    found: list[dict[str, Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {name: tensor.cpu() for name, tensor in tensors.items()})
    return [piece for piece in found if piece is not None]


def everyone_done(done: bool, device: torch.device) -> bool:
    """Whether every process is done; a process that is must go on with the forward passes that others wait for."""
    return not added(torch.tensor(0.0 if done else 1.0, device=device)).item()
