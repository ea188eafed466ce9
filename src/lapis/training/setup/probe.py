"""How to compute a step fastest on this machine: measured, not guessed, and without touching the run."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Precision = Literal["float32", "bf16"]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a loss is computed."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads set to `count`, and put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def timer(
    model: nn.Module, compute: Callable[[], torch.Tensor], count: int, precision: str, rounds: int = 2
) -> Callable[[], float]:
    """Measures one forward and backward of `compute`: seconds, the shortest of `rounds` after one that warms up.

    Gradients are dropped and random generators put back.
    """
    device = next(model.parameters()).device

    def seconds() -> float:
        best = float("inf")
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), threads(count):
            for attempt in range(1 + rounds):
                start = time.perf_counter()
                with autocast(device, precision):
                    loss = compute()
                loss.backward()  # type: ignore[no-untyped-call]
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                model.zero_grad(set_to_none=True)
                best = min(best, time.perf_counter() - start) if attempt else best
        return best

    return seconds


def fastest(
    model: nn.Module, compute: Callable[[], torch.Tensor], precision: str, count: int, rounds: int = 2
) -> tuple[int, Precision]:
    """(threads, precision) with the shortest forward and backward; "auto" and 0 are the ones to choose.

    compute: one micro-batch's loss; it must not advance the data. Gradients are dropped and random generators put
    back, so that a run is the same whether it was measured or not. A way that is far behind is not tried twice.
    """
    device = next(model.parameters()).device
    most = torch.get_num_threads()
    counts = [count] if count else sorted({most, 1}, reverse=True) if device.type == "cpu" else [most]
    ways: list[Precision] = (
        ["bf16", "float32"] if precision == "auto" else ["bf16" if precision == "bf16" else "float32"]
    )
    tried = [(n, way) for n in counts for way in ways]
    if len(tried) == 1:
        return tried[0]
    best, chosen = float("inf"), tried[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for n, way in tried:
            with threads(n):
                for attempt in range(1 + rounds):
                    start = time.perf_counter()
                    with autocast(device, way):
                        loss = compute()
                    loss.backward()  # type: ignore[no-untyped-call]
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    seconds = time.perf_counter() - start
                    model.zero_grad(set_to_none=True)
                    if attempt == 0 and seconds > 3 * best:
                        break  # the first round also warms up, so it may be slow; this is slower than that
                    if attempt > 0 and seconds < best:
                        best, chosen = seconds, (n, way)
    return chosen
