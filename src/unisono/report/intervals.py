"""How far a score would move on other test rows: Wilson's interval and the bootstrap."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np

from unisono.plots.arrays import Array

RESAMPLES: Final = 1000
_Z: Final = 1.959964  # 95 % of a normal distribution are within
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
    """Interval of a share of independent rows: Wilson's, which is right at 0 % and 100 % too.

    Example:
        >>> [round(value, 3) for value in wilson(0.9, 100)]
        [0.9, 0.826, 0.945]
    """
    z2 = _Z**2 / rows
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows))
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


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
