"""How many threads compute: what the user set, or what a short measurement finds fastest on the machine as it is now.

    settle_threads()              before a command computes with a model
    with threads(1): ...          torch's threads set, and put back
    processor_fields()            what the system says of the processor

Threads of a busy machine wait for each other at every product: on two cores that other work kept busy, two took seven
times as long as one. So more than one are taken only where they are faster now. `OMP_NUM_THREADS` (or
`MKL_NUM_THREADS`) settles it, and nothing is measured. Leaves out training, which measures its own steps
(training/setup/probe.py), and arithmetic on weights, which gives each of its threads work of its own.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # what torch obeys as well
ROWS, DIM = 16, 1024  # of a product as short as those of one layer, where waiting shows
TURNS = 4  # a busy machine's mood changes, so all are tried in turn
SECONDS = 0.03  # of each try


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads set to `count`, and put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def thread_counts(most: int | None = None) -> list[int]:
    """The counts among which a measurement chooses, the largest first; one alone where the user set it.

    Args:
        most: No more than these.
    """
    count = min(torch.get_num_threads(), most or torch.get_num_threads())
    if any(os.environ.get(name) for name in SETTINGS):
        return [count]
    return sorted({count, 1}, reverse=True)


def settle_threads(device: torch.device) -> None:
    """Sets torch's threads to the fastest count for this process."""
    torch.set_num_threads(choose_threads(device))


def choose_threads(device: torch.device) -> int:
    """The fastest count, measured in about a third of a second; as it is where a GPU computes, or the user set it."""
    counts = thread_counts()
    return fastest(counts) if len(counts) > 1 and device.type == "cpu" else torch.get_num_threads()


@torch.no_grad()
def fastest(counts: list[int]) -> int:
    """The count with which most products are computed in the same time."""
    generator = torch.Generator().manual_seed(0)
    weight_DD = torch.randn(DIM, DIM, generator=generator) / DIM**0.5
    x_TD = torch.randn(ROWS, DIM, generator=generator)
    done, spent = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0.0)
    for turn in range(TURNS + 1):
        for count in counts:
            with threads(count):
                start = time.perf_counter()
                products = 0
                while not products or time.perf_counter() - start < SECONDS:
                    x_TD = F.normalize(F.silu(F.linear(x_TD, weight_DD)), dim=-1)
                    products += 1
                if turn:  # the first one also starts the threads
                    done[count] += products
                    spent[count] += time.perf_counter() - start
    return max(counts, key=lambda count: done[count] / spent[count])


def processor_fields() -> dict[str, str]:
    """/proc/cpuinfo of the first processor: field -> what stands behind it. Raises OSError where there is none."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
