"""The little that an objective with rollouts must know of ranks: which parts of a step are its own, and sums over all.

With one process everything is its own and nothing is said. Leaves out: gradients (parallel.py).
"""

import torch
from torch import Tensor

from lapis.training.distributed.parallel import join
from lapis.training.objectives.policy.experience import Experience, appended


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


def everybodys(own: list[int], experience: Experience) -> Experience:
    """The experience of all processes in the order of the step's parts, so that one of them can save it all, and any
    number of processes can go on from it. own: the parts that `experience` is of."""
    world = join()
    if world.size == 1:
        return experience
    said = {name: [str(t.dtype)[6:], t.tolist()] for name, t in experience.tensors().items()}
    shares = world.gather([own, said])
    pieces: dict[int, Experience] = {}
    for parts, said in shares:
        tensors = {name: torch.tensor(value, dtype=getattr(torch, kind)) for name, (kind, value) in said.items()}
        piece = Experience.of(tensors)
        size = len(piece) // len(parts)
        pieces |= {part: piece.rows(place * size, (place + 1) * size) for place, part in enumerate(parts)}
    return appended([pieces[part] for part in sorted(pieces)])
