"""What a tour computes with: the precision by what the machine is, the threads by how fast they are now.

The precision is never measured: a busy machine would choose otherwise, and end with other models. Threads change the
models by no more than rounding; on a machine that other work shares, several may wait for each other longer than one
takes alone. Leaves out: how long the tour takes with it (clock.py).
"""

import time
from dataclasses import dataclass
from typing import Literal

import torch

from lapis.model.threads import thread_counts, threads
from lapis.model.transformer import Transformer
from lapis.training.objectives.supervised.next_token import summed_cross_entropy
from lapis.training.optim.optimizers import Optimizers
from lapis.training.setup.blocks import autocast

MOST_THREADS = 4  # matrices of this size keep no more busy


@dataclass(frozen=True)
class Machine:
    """Threads and precision of every run of a tour."""

    threads: int
    precision: Literal["float32", "bf16"]

    @property
    def summary(self) -> str:
        """For people: threads and precision."""
        kind = "bfloat16" if self.precision == "bf16" else "float32"
        return f"{self.threads} thread{'s' * (self.threads > 1)}, {kind}"


def settle(precision: str, model: Transformer, context: int) -> tuple[Machine, float]:
    """The machine as it is, and the seconds that a training step takes on it for each token.

    Args:
        precision: "float32", "bf16", or "auto": bf16 where the processor multiplies in it.
        model: Of the size that is to be trained. It learns from this, so it is not the one that is trained.
        context: Tokens of a row.
    """
    kind = settle_precision(precision)
    *more, least = thread_counts(MOST_THREADS)
    best = Machine(least, kind)
    seconds = seconds_per_token(model, best, context)
    for most in more:
        several = Machine(most, kind)
        with_several = seconds_per_token(model, several, context, limit=3 * seconds)
        if with_several < seconds:
            return several, with_several
    return best, seconds


def settle_precision(precision: str) -> Literal["float32", "bf16"]:
    """What "auto" stands for on this processor; the others as they are."""
    if precision == "auto":
        return "bf16" if multiplies_bfloat16() else "float32"
    return "bf16" if precision == "bf16" else "float32"


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for products of bfloat16. Without, they take longer than float32."""
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in known)


def seconds_per_token(
    model: Transformer, machine: Machine, context: int, steps: int = 4, limit: float = float("inf")
) -> float:
    """How long a training step takes for each of its tokens: the shortest of a few, on random tokens.

    limit: a machine whose first step takes longer is not tried further.
    """
    optimizers = Optimizers(model, "muon", 1e-3, 0.0)
    optimizers.set_precision(machine.precision)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab, (4, context), generator=generator)
    best = float("inf")
    with threads(machine.threads):
        for step in range(steps):
            start = time.perf_counter()
            with autocast(torch.device("cpu"), machine.precision):
                loss = summed_cross_entropy(model, model.hidden(ids_BT).flatten(0, 1), ids_BT.flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers.step(1.0, step)
            optimizers.clear()
            best = min(best, (time.perf_counter() - start) / ids_BT.numel())
            if best > limit:
                break
    return best
