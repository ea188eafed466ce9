"""Figures with their intervals: what was counted in each document in, a value and its 95 % bootstrap interval out.

A bootstrap sample draws as many documents as there are, with replacement (Efron 1979); 1,000 samples from a fixed seed.
Two models that were measured on the same documents are compared on the same samples, so that what makes a document hard
does not count as a difference.
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
        """sum(numbers) / sum(sizes) of all documents, and of each bootstrap sample (NaN where nothing was measured)."""
        top, bottom = np.array(self.numbers, float), np.array(self.sizes, float)
        drawn = np.random.default_rng(0).integers(0, len(top), (SAMPLES, len(top)))
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(top.sum() / bottom.sum()), top[drawn].sum(1) / bottom[drawn].sum(1)


def ratio(counts: Counts) -> Figure:
    """{"value", "interval", "n"} of what was counted."""
    return _figure(*counts.sampled(), counts.n)


def change(before: Counts, after: Counts) -> Figure:
    """By which share `after` lies above `before`, on the same documents."""
    (old, olds), (new, news) = before.sampled(), after.sampled()
    with np.errstate(invalid="ignore", divide="ignore"):
        return _figure(new / old - 1 if old else math.nan, news / olds - 1, min(before.n, after.n))


def difference(before: Counts, after: Counts) -> Figure:
    """How much `after` lies above `before`, on the same documents."""
    (old, olds), (new, news) = before.sampled(), after.sampled()
    return _figure(new - old, news - olds, min(before.n, after.n))


def share_of_way(start: Counts, reached: Counts, end: Counts) -> Figure:
    """How much of the way from `start` down to `end` was gone, on the same documents."""
    (a, many_a), (b, many_b), (c, many_c) = start.sampled(), reached.sampled(), end.sampled()
    with np.errstate(invalid="ignore", divide="ignore"):
        return _figure((a - b) / (a - c), (many_a - many_b) / (many_a - many_c), min(start.n, reached.n, end.n))


def _figure(value: float, samples: Floats, count: int) -> Figure:
    finite = samples[np.isfinite(samples)]
    low, high = np.quantile(finite, (0.025, 0.975)) if len(finite) else (value, value)
    return {"value": value, "interval": [float(low), float(high)], "n": count}
