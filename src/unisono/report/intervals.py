"""How far a score would move on other test rows: Wilson's interval and the bootstrap."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np

from unisono.plots.arrays import Array
from unisono.plots.reliability import wilson_interval

RESAMPLES: Final = 1000
_BLOCK: Final = 4_000_000  # weights that are held at once


class Interval(NamedTuple):
    """A score with its interval of 95 %.

    Args:
        value: The score; NaN if there is none.
        low, high: The ends; NaN if there is no interval.
    """

    value: float
    low: float
    high: float


def wilson(share: float, rows: int) -> Interval:
    """A share of independent rows with Wilson's interval.

    Example:
        >>> [round(value, 3) for value in wilson(0.9, 100)]
        [0.9, 0.826, 0.945]
    """
    low, high = wilson_interval(np.array(share), np.array(rows))
    return Interval(share, float(low), float(high))


def bootstrap_means(values: Array, *, seed: int = 0) -> Array:
    """Means over rows that are drawn anew, with replacement, a thousand times.

    All values are averaged over the same rows each time, so what is computed from several means,
    as a difference of two models, has their common ups and downs taken out.

    Args:
        values: Values of each row.
        seed: Of the draws.

    Shape:
        - values: (K, B)
        - returns: (1000, K)
    """
    rows = values.shape[1]
    generator = np.random.default_rng(seed)
    means = []
    block = max(1, _BLOCK // rows)
    for start in range(0, RESAMPLES, block):
        counts = [
            np.bincount(generator.integers(rows, size=rows), minlength=rows)
            for _ in range(min(block, RESAMPLES - start))
        ]
        means.append(np.stack(counts).astype(np.float64) @ values.T / rows)
    return np.concatenate(means)


def percentile_interval(value: float, draws: Array) -> Interval:
    """The score, and what 95 % of its bootstrapped values lie within."""
    if not np.isfinite(draws).all():
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(value, float(low), float(high))
