"""Which rows of the data each member sees: the same ones, its own order, its own resample ...

What these functions return has the methods ``rows``, ``held_out`` and ``order``, pure functions of
the number of rows, the seed, the member and the epoch. Member i sees the same rows in the same
order in an ensemble of 5 and of 50, also after other members have stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from unisono.training import kinds
from unisono.training.kinds import Sampling as Sampling


def shared() -> Sampling:
    """Give all members the same minibatches, in a new order each epoch.

    ``order(...)[i] == order(...)[0]``. The members then differ in their initial weights and
    hyperparameters alone, and the minibatch is loaded and moved once for all of them.

    Returns:
        The sampling.

    Example:
        >>> shared().order(4, [0, 1], epoch=0, seed=0, num_members=2).shape
        (2, 4)
    """
    return kinds.Shared()


def shuffled() -> Sampling:
    """Give each member all rows, in an order of its own each epoch.

    ``sorted(order(...)[i]) == range(num_rows)``. Deep ensembles are trained like this.

    Returns:
        The sampling.

    Reference: Lakshminarayanan, Pritzel and Blundell, "Simple and Scalable Predictive Uncertainty
    Estimation using Deep Ensembles", 2017, https://arxiv.org/abs/1612.01474

    Example:
        >>> order = shuffled().order(4, [0, 1], epoch=0, seed=0, num_members=2)
        >>> [sorted(own) for own in order.tolist()]
        [[0, 1, 2, 3], [0, 1, 2, 3]]
    """
    return kinds.Shuffled()


def bootstrap() -> Sampling:
    """Give each member a resample of its own: n of n rows, drawn with replacement.

    ``rows(...) == rng_i.integers(n, size=n)``: drawn once, and seen in an order of its own each
    epoch. ``held_out`` are the out-of-bag rows, a share of ``(1 - 1/n)^n``, about 37 %.

    Returns:
        The sampling.

    Reference: Breiman, "Bagging predictors", 1996, https://doi.org/10.1007/BF00058655

    Example:
        >>> resample = bootstrap()
        >>> len(resample.rows(1000, 3, seed=0, num_members=5))
        1000
        >>> 300 < len(resample.held_out(1000, 3, seed=0, num_members=5)) < 440
        True
    """
    return kinds.Bootstrap()


def folds(k: int | None = None) -> Sampling:
    """Give each member all rows but one of k folds: member i never sees fold ``i % k``.

    The folds are one random partition of the rows by the seed; their sizes differ by one at most.
    So that all members take equally many steps, an epoch has ``n - ceil(n / k)`` rows: a member
    whose fold is one of the smaller ones leaves out one of its rows each epoch, at random.

    Args:
        k: Number of folds; None for one per member.

    Returns:
        The sampling.

    Raises:
        ValueError: If k is below 2.

    Reference: https://scikit-learn.org/stable/modules/cross_validation.html#k-fold

    Example:
        >>> held_out = [folds().held_out(6, i, seed=0, num_members=3) for i in range(3)]
        >>> sorted(row for rows in held_out for row in rows.tolist())
        [0, 1, 2, 3, 4, 5]
    """
    return kinds.Folds(k)


def subset(fraction: float) -> Sampling:
    """Give each member a random part of the rows, drawn once without replacement.

    It has ``max(1, round(fraction * n))`` rows, seen in an order of its own each epoch.

    Args:
        fraction: The part, above 0 and at most 1.

    Returns:
        The sampling.

    Raises:
        ValueError: If the fraction is no such number.

    Reference: Breiman, "Pasting small votes for classification in large databases and on-line",
    1999, https://doi.org/10.1023/A:1007563306331

    Example:
        >>> len(set(subset(0.5).rows(10, 0, seed=0, num_members=2).tolist()))
        5
    """
    return kinds.Subset(fraction)


_BY_NAME: Final[Mapping[str, Callable[[], Sampling]]] = {
    "shared": shared,
    "shuffled": shuffled,
    "bootstrap": bootstrap,
    "folds": folds,
}


def as_sampling(value: str | Sampling) -> Sampling:
    """Return the sampling that a name stands for: ``"bootstrap"`` for ``bootstrap()``.

    Args:
        value: A name, or a sampling, which is returned as it is.

    Returns:
        The sampling.

    Raises:
        ValueError: If there is no sampling of that name.
        TypeError: If it is neither a name nor a sampling.

    Example:
        >>> as_sampling("folds")
        Folds(k=None)
    """
    if isinstance(value, Sampling):
        return value
    if value == "subset":
        raise ValueError(
            'sampling: "subset" alone doesn\'t say how large; give a part of the rows:'
            " sampling.subset(0.5)"
        )
    if isinstance(value, str):
        if value in _BY_NAME:
            return _BY_NAME[value]()
        raise ValueError(f"sampling is one of {_allowed()}; got {value!r}")
    raise TypeError(f"sampling is one of {_allowed()}; got {_shown(value)}")


def _allowed() -> str:
    return ", ".join(f'"{name}"' for name in _BY_NAME) + ", or sampling.subset(fraction)"


def _shown(value: Any) -> str:
    if callable(value) and value in (*_BY_NAME.values(), subset):
        return f"the function {value.__name__}; call it: sampling.{value.__name__}(...)"
    return repr(value)
