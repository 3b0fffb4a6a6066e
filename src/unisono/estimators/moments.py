"""Mean and scale of columns, of all rows at once or batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class Moments:
    """Weight, mean and standard deviation of columns.

    Args:
        weight: Sum of the rows' weights.
        mean: Weighted mean of each column.
        std: Weighted standard deviation, divided by the weight and not one less.

    Shape:
        - mean, std: (F)
    """

    weight: float
    mean: Array
    std: Array

    def scale(self) -> Array:
        """What to divide by: the standard deviation, and 1 where a column is constant.

        Shape:
            - returns: (F)
        """
        # What is left of a constant after rounding is no scale: it would blow up noise.
        is_constant = self.std <= 16 * np.finfo(np.float64).eps * np.abs(self.mean)
        return np.where(is_constant | (self.std == 0), 1.0, self.std)


def moments(values: Array, weights: Array | None = None) -> Moments:
    """Take the moments of columns: ``sum_b w[b] x[b] / sum w``, likewise the squares.

    Args:
        values: Finite numbers.
        weights: One for each row, none below zero and one above; None for equal ones.

    Returns:
        The moments, float64.

    Shape:
        - values: (B, F)
        - weights: (B)

    Example:
        >>> moments(np.array([[1.0, 7.0], [3.0, 7.0]])).scale()
        array([1., 1.])
    """
    values = np.asarray(values, dtype=np.float64)
    if weights is None:
        weights = np.ones(len(values))
    shares = weights / weights.sum()
    # From the first row on, so that a constant column has exactly no deviation.
    first = values[0]
    mean = first + shares @ (values - first)
    deviation = values - mean
    largest = np.abs(deviation).max(0)
    unit = np.where(largest > 0, largest, 1.0)  # squares of large numbers would overflow
    std = unit * np.sqrt(shares @ np.square(deviation / unit))
    return Moments(float(weights.sum()), mean, std)


def merge(one: Moments | None, other: Moments) -> Moments:
    """Moments of the rows of both, as if they had come at once.

    Args:
        one: Moments; None for those of no rows.
        other: Moments of other rows.

    Returns:
        The moments of all.

    Example:
        >>> half = moments(np.array([[0.0], [2.0]]))
        >>> merge(half, moments(np.array([[4.0], [6.0]]))).mean
        array([3.])

    Reference: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979, https://doi.org/10.1007/978-3-642-51461-6_3
    """
    if one is None:
        return other
    weight = one.weight + other.weight
    a, b = one.weight / weight, other.weight / weight
    step = other.mean - one.mean
    inside = np.hypot(np.sqrt(a) * one.std, np.sqrt(b) * other.std)
    return Moments(weight, one.mean + b * step, np.hypot(inside, np.sqrt(a * b) * step))
