"""The little that an objective with rollouts must know of ranks: which parts of a step are its own, and sums over all.

With one process everything is its own and nothing is said. Leaves out: gradients (parallel.py).
"""

import torch
from torch import Tensor

from lapis.train.experience import Experience, appended
from lapis.train.parallel import join


def mine(parts: int) -> list[int]:
    """The micro-batches of a step that this process computes: rank, rank + size, ..."""
    world = join()
    return list(range(world.rank, parts, world.size))


def added(sums: Tensor) -> Tensor:
    """The vector, summed over all processes; every process must call this."""
    world = join()
    if world.size == 1:
        return sums
    shares = torch.tensor(world.gather(sums.tolist()), dtype=sums.dtype, device=sums.device)
    return shares.sum(0)


def everybodys(own: list[int], experience: Experience) -> tuple[list[int], Experience]:
    """The parts and the experience of all processes, in the order of ranks, so that one of them can save it all."""
    world = join()
    if world.size == 1:
        return own, experience
    said = {name: [str(t.dtype)[6:], t.tolist()] for name, t in experience.tensors().items()}
    shares = world.gather([own, said])
    pieces = [
        Experience.of({name: torch.tensor(value, dtype=getattr(torch, kind)) for name, (kind, value) in said.items()})
        for _, said in shares
    ]
    return [part for parts, _ in shares for part in parts], appended(pieces)
