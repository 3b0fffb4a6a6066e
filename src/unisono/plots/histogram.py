"""The histogram of an uncertainty on two kinds of rows, as in and out of distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from unisono.plots.arrays import Array, Values, check_finite, checked
from unisono.plots.figure import BLUE, VERMILLION, axes_for, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CALL: Final = "uncertainty_histogram"


def uncertainty_histogram(
    inside: Values,
    outside: Values,
    *,
    names: tuple[str, str] = ("in distribution", "out of distribution"),
    what: str = "epistemic uncertainty (nats)",
    bins: int = 30,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw how an uncertainty is spread over known rows and over foreign ones.

    The legend tells the area under the ROC curve, ``AUROC = P(outside > inside) + P(equal) / 2``:
    1 if the uncertainty tells both kinds apart, 0.5 if it knows nothing of them.

    Args:
        inside: The uncertainty of each row of the first kind, which is to be the lower one.
        outside: The same of the second kind.
        names: Of both kinds; such as ``("right answers", "wrong answers")``.
        what: Name and unit of the uncertainty.
        bins: Number of bins of equal width.
        title: A line above.
        ax: Where to draw; None for a new figure, ``.figure`` of what is returned.

    Returns:
        The axes.

    Shape:
        - inside: (n,)
        - outside: (m,)

    Raises:
        ValueError: If one of both is empty, of another shape, or has values that aren't finite.
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> ax = uncertainty_histogram([0.1, 0.2, 0.4], [0.3, 0.9])
        >>> ax.get_legend().get_title().get_text()
        'AUROC 0.833'
    """
    arrays = checked(_CALL, {"inside": (inside, "n"), "outside": (outside, "m")})
    check_finite(_CALL, arrays)
    near, far = arrays["inside"], arrays["outside"]
    if bins < 1:
        raise ValueError(f"plots.{_CALL}: bins must be at least 1, got {bins}")
    ax = axes_for(ax, title)
    edges = np.histogram_bin_edges(np.concatenate([near, far]), bins)
    styles: tuple[dict[str, Any], ...] = (
        {"fc": "#A6CBE3", "ec": BLUE, "lw": 1.2},
        {"fc": "none", "ec": VERMILLION, "lw": 1.2, "hatch": "////"},  # told apart in grey
    )
    highest = 0.0
    for name, values, style in zip(names, (near, far), styles, strict=True):
        share = np.histogram(values, edges)[0] / len(values)
        highest = max(highest, share.max())
        rows = "1 row" if len(values) == 1 else f"{len(values):,} rows"
        ax.stairs(share, edges, fill=True, label=f"{name}, {rows}", **style)
    ax.set_xlabel(what, parse_math=False)
    ax.set_ylabel("share of the rows of its kind")
    ax.set_ylim(0, 1.3 * highest)  # room for the legend
    legend(ax, title=f"AUROC {_auroc(near, far):.3f}")
    return ax


def _auroc(inside: Array, outside: Array) -> float:
    """Probability that a value of `outside` is above one of `inside`; equal ones count half."""
    ordered = np.sort(inside)
    below = np.searchsorted(ordered, outside, side="left")
    at_most = np.searchsorted(ordered, outside, side="right")
    return float((below + at_most).mean() / (2 * len(inside)))
