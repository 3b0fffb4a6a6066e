"""A score against the number of members: how many are enough."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from torch import Tensor

from unisono.plots.arrays import Array, Values, check_finite, checked
from unisono.plots.figure import BLACK, BLUE, axes_for, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_SIZES: Final = 12


class SubsetScores(NamedTuple):
    """What `subset_scores` returns and `score_by_size` draws.

    Args:
        sizes: Numbers of members, rising.
        scores: For each size the scores of the subsets of so many members.

    Example:
        >>> SubsetScores((1, 2), ([0.8, 0.9], [0.95])).sizes
        (1, 2)
    """

    sizes: tuple[int, ...]
    scores: tuple[Sequence[float], ...]


def subset_scores(
    outputs: Array | Tensor,
    score: Callable[[Any], float],
    *,
    sizes: Sequence[int] | None = None,
    subsets: int = 20,
    seed: int = 0,
) -> SubsetScores:
    """Score ensembles of some of the members: ``score(outputs[members])``.

    All subsets of a size are taken if there are no more than `subsets`, else so many at random.

    Args:
        outputs: Of all members.
        score: From the outputs of some members, (k, B, ...), to a number.
        sizes: Numbers of members; None for at most twelve from 1 to N.
        subsets: How many subsets of each size.
        seed: Where the random subsets start.

    Returns:
        The scores, for `score_by_size`.

    Shape:
        - outputs: (N, B, ...)

    Raises:
        ValueError: If there is no member, or a size isn't from 1 to N.

    Example:
        >>> votes = np.array([[0, 1, 1], [0, 1, 0], [0, 0, 1]])
        >>> found = subset_scores(votes, lambda some: (some.mean(0) > 0.5)[1:].mean())
        >>> found.sizes, [round(float(np.mean(own)), 3) for own in found.scores]
        ((1, 2, 3), [0.667, 0.333, 1.0])
    """
    outputs = outputs.detach() if isinstance(outputs, Tensor) else outputs
    n = outputs.shape[0] if outputs.ndim else 0
    if n == 0:
        raise ValueError(
            f"plots.subset_scores: outputs must be (N, B, ...), got shape {tuple(outputs.shape)}"
        )
    chosen = _spread(n) if sizes is None else tuple(sorted({int(size) for size in sizes}))
    if subsets < 1 or not chosen or chosen[0] < 1 or chosen[-1] > n:
        raise ValueError(
            f"plots.subset_scores: sizes must be from 1 to {n}, the number of members, and "
            f"subsets at least 1; got sizes {list(chosen)} and subsets {subsets}"
        )
    generator = np.random.default_rng(seed)
    scores = []
    for size in chosen:
        if math.comb(n, size) <= subsets:
            taken = [list(some) for some in itertools.combinations(range(n), size)]
        else:
            taken = [generator.permutation(n)[:size].tolist() for _ in range(subsets)]
        scores.append([float(score(outputs[some])) for some in taken])
    return SubsetScores(chosen, tuple(scores))


def score_by_size(
    sizes: Values,
    scores: Sequence[Values],
    *,
    what: str = "accuracy",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw a score over the number of members: the mean over subsets, and how far they spread.

    The band holds the middle 90 % of the subsets. `subset_scores` makes the numbers.

    Args:
        sizes: Numbers of members, rising.
        scores: For each size the scores of subsets of so many members; as many as there are.
        what: Name of the score.
        title: A line above.
        ax: Where to draw; None for a new figure, ``.figure`` of what is returned.

    Returns:
        The axes.

    Shape:
        - sizes: (n,)
        - scores: n of (any,)

    Raises:
        ValueError: If there isn't a score for each size, or a value isn't finite.
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> ax = score_by_size([1, 2, 4], [[0.8, 0.9, 0.85], [0.9, 0.92], [0.93]])
        >>> ax.get_xlabel()
        'number of members'
    """
    numbers = checked("score_by_size", {"sizes": (sizes, "n")})["sizes"]
    if len(scores) != len(numbers):
        raise ValueError(
            f"plots.score_by_size: {len(numbers)} sizes need {len(numbers)} lists of scores, "
            f"got {len(scores)}"
        )
    # Each with a letter of its own: there are fewer subsets of all members than of half of them.
    given = {f"scores[{i}]": (own, f"n{i}") for i, own in enumerate(scores)}
    arrays = checked("score_by_size", given)
    check_finite("score_by_size", arrays)
    found = list(arrays.values())
    ax = axes_for(ax, title)
    from matplotlib.ticker import MaxNLocator

    mean = np.array([own.mean() for own in found])
    low, high = np.array([np.percentile(own, [5, 95]) for own in found]).T
    label = "middle 90 % of the subsets"
    if len(numbers) > 1:
        ax.fill_between(numbers, low, high, fc="#A6CBE3", ec=BLUE, lw=0.8, label=label)
    ax.plot(numbers, mean, color=BLACK, lw=2, marker="o", ms=4, label="mean over subsets")
    ax.set_xlabel("number of members")
    ax.set_ylabel(what, parse_math=False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend(ax)
    return ax


def _spread(n: int) -> tuple[int, ...]:
    """At most twelve numbers from 1 to n, closer to each other where they are small."""
    spread = np.geomspace(1, n, min(n, _MOST_SIZES))
    sizes = np.unique(np.rint(spread).astype(int)) if n > _MOST_SIZES else np.arange(1, n + 1)
    return tuple(sizes.tolist())
