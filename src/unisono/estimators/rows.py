"""Which rows train, which are held out, and what each of them weighs."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from unisono.estimators.moments import Array

_FEWEST_HELD_OUT: Final = 10


def check_weights(call: str, weights: Any, num_rows: int) -> Array | None:
    """The weights of the rows as float64, or None if they say nothing.

    Args:
        call: Name of the public function, for the message.
        weights: What the user gave as ``sample_weight``.
        num_rows: Number of rows.

    Returns:
        One weight for each row.

    Shape:
        - returns: (B)

    Raises:
        ValueError: If they aren't so many finite numbers, none below zero and one above.
    """
    if weights is None:
        return None
    try:
        found = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{call}: sample_weight holds something that is no number") from error
    if found.ndim == 0:
        found = np.full(num_rows, found)
    if found.shape != (num_rows,):
        raise ValueError(
            f"{call}: sample_weight is one number for each of the {num_rows} rows, so of shape"
            f" ({num_rows},); got shape {found.shape}"
        )
    wrong = np.flatnonzero(~(np.isfinite(found) & (found >= 0)))
    if len(wrong):
        raise ValueError(
            f"{call}: sample_weight is finite and not negative, but {len(wrong)} of {num_rows}"
            f" aren't: sample_weight[{wrong[0]}] is {found[wrong[0]]}"
        )
    if not found.any():
        raise ValueError(f"{call}: all {num_rows} of sample_weight are zero: no row is left")
    return found


def with_weight(x: Array, y: Array, weights: Array | None) -> tuple[Array, Array, Array | None]:
    """The rows whose weight isn't zero.

    Args:
        x: Features.
        y: Targets.
        weights: None for equal ones.

    Shape:
        - x, y: (B, *)
        - weights: (B)
    """
    if weights is None or weights.all():
        return x, y, weights
    rows = weights > 0
    return x[rows], y[rows], weights[rows]


def hold_out(num_rows: int, fraction: float, keys: Array | None, seed: int) -> tuple[Array, Array]:
    """Split the rows into those that train and those to stop by.

    The rows are put in order by key, and rows at equal distances are held out, so that they have
    the keys in the same shares. A key that stands once stays among those that train. So few held
    out rows that their mean loss says little, below 10, are none.

    Args:
        num_rows: Number of rows.
        fraction: Part of them that is to be held out, at most a half.
        keys: A class or a number for each row; None for a random choice.
        seed: Of the choice.

    Returns:
        The rows that train and those held out, ascending.

    Shape:
        - keys: (B)

    Example:
        >>> train, held_out = hold_out(100, 0.1, np.repeat([0, 1], 50), seed=0)
        >>> len(train), (held_out < 50).sum()
        (90, np.int64(5))
    """
    everyone = np.arange(num_rows)
    size = round(fraction * num_rows)
    rng = np.random.default_rng([seed, num_rows])
    rows = rng.permutation(num_rows)
    if keys is not None:
        _, place, count = np.unique(keys, return_inverse=True, return_counts=True)
        if len(count) < num_rows:  # classes, not numbers that are all different
            rows = rows[count[place[rows]] > 1]
        rows = rows[np.argsort(keys[rows], kind="stable")]
    size = min(size, len(rows) // 2)
    if size < _FEWEST_HELD_OUT:
        return everyone, everyone[:0]
    chosen = rows[((np.arange(size) + rng.random()) * (len(rows) / size)).astype(np.int64)]
    held_out = np.sort(chosen)
    return np.setdiff1d(everyone, held_out), held_out
