"""Figures with their intervals: what was counted in each document in, a value and its 95 % bootstrap interval out.

A bootstrap sample draws as many documents as were measured, with replacement (Efron 1979); 1,000 samples from a fixed
seed. Models are compared on the documents that all of them were measured on, and on the same samples of these, so that
neither what makes a document hard nor what did not fit into one of them counts as a difference.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAMPLES = 1000
Figure = dict[str, Any]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """numbers: Of each document what was counted. sizes: What it was counted for; 0 where it was not measured."""

    numbers: Sequence[float]
    sizes: Sequence[float]

    @property
    def n(self) -> int:
        """Documents that were measured."""
        return sum(size > 0 for size in self.sizes)

    def sampled(self) -> tuple[float, Floats]:
        """sum(numbers) / sum(sizes) of the documents that were measured, and of each bootstrap sample of them; NaN
        where there are none."""
        sizes = np.array(self.sizes, float)
        top, bottom = np.array(self.numbers, float)[sizes > 0], sizes[sizes > 0]
        if not len(top):
            return math.nan, np.full(SAMPLES, math.nan)
        drawn = np.random.default_rng(0).integers(0, len(top), (SAMPLES, len(top)))
        return float(top.sum() / bottom.sum()), top[drawn].sum(1) / bottom[drawn].sum(1)


def common(*many: Counts) -> tuple[Counts, ...]:
    """The same counts of those documents alone that all of them have measured."""
    shared = [place for place, sizes in enumerate(zip(*(one.sizes for one in many), strict=True)) if min(sizes) > 0]
    return tuple(Counts([one.numbers[i] for i in shared], [one.sizes[i] for i in shared]) for one in many)


def ratio(counts: Counts) -> Figure:
    """{"value", "interval", "n"} of what was counted."""
    return _figure(*counts.sampled(), counts.n)


def change(before: Counts, after: Counts) -> Figure:
    """By which share `after` lies above `before`, on the documents that both have; "before" and "after" are theirs."""
    old, new = common(before, after)
    (a, many_a), (b, many_b) = old.sampled(), new.sampled()
    with np.errstate(invalid="ignore", divide="ignore"):
        figure = _figure(b / a - 1 if a else math.nan, many_b / many_a - 1, old.n)
    return {**figure, "before": a, "after": b}


def difference(before: Counts, after: Counts) -> Figure:
    """How much `after` lies above `before`, on the documents that both have; "before" and "after" are theirs."""
    old, new = common(before, after)
    (a, many_a), (b, many_b) = old.sampled(), new.sampled()
    return {**_figure(b - a, many_b - many_a, old.n), "before": a, "after": b}


def share_of_way(start: Counts, reached: Counts, end: Counts) -> Figure:
    """How much of the way from `start` down to `end` was gone, on the documents that all three have; NaN where there
    is no way down."""
    shared = common(start, reached, end)
    (a, many_a), (b, many_b), (c, many_c) = (one.sampled() for one in shared)
    with np.errstate(invalid="ignore", divide="ignore"):
        way = (a - b) / (a - c) if a > c else math.nan
        return _figure(way, (many_a - many_b) / (many_a - many_c), shared[0].n)


def _figure(value: float, samples: Floats, count: int) -> Figure:
    finite = samples[np.isfinite(samples)]
    low, high = np.quantile(finite, (0.025, 0.975)) if len(finite) else (value, value)
    return {"value": value, "interval": [float(low), float(high)], "n": count}
