"""Heat maps of how much every two members agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from unisono.plots.arrays import Array, Values, check_finite, checked
from unisono.plots.figure import axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_NUMBERS: Final = 10  # members whose numbers fit into the cells


def disagreement_heat_map(labels: Values, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw on which share of the rows every two members name different classes.

    Members that never disagree are one member; the more they disagree at the same accuracy, the
    more the ensemble gains. The diagonal is grey.

    Args:
        labels: The class that each member names.
        title: A line above.
        ax: Where to draw; None for a new figure, ``.figure`` of what is returned.

    Returns:
        The axes.

    Shape:
        - labels: (N, B)

    Raises:
        ValueError: If `labels` isn't (N, B), or is empty.
        TypeError: If they are no whole numbers.
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> ax = disagreement_heat_map([[0, 1, 2, 2], [0, 1, 2, 1]])
        >>> ax.get_xlabel(), ax.images[0].get_array()[0, 1].item()
        ('member', 0.25)
    """
    named = checked("disagreement_heat_map", {"labels": (labels, "N B")})["labels"]
    if named.dtype.kind == "f":
        raise TypeError(
            f"plots.disagreement_heat_map: labels must be classes, got {named.dtype}; of logits "
            "(N, B, C) write `logits.argmax(-1)`"
        )
    # Row by row: all pairs at once would take N times the memory of the labels.
    apart = np.stack([(named != own).mean(1) for own in named])
    return _heat_map(apart, "share of rows on which two members disagree", title, ax)


def correlation_heat_map(outputs: Values, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw how much the outputs of every two members correlate over the rows (Pearson's r).

    Give errors (outputs minus targets) to see whether members are wrong together: what correlates
    there doesn't average out. The diagonal is grey, and so is a member that is constant.

    Args:
        outputs: One number per member and row.
        title: A line above.
        ax: Where to draw; None for a new figure, ``.figure`` of what is returned.

    Returns:
        The axes.

    Shape:
        - outputs: (N, B)

    Raises:
        ValueError: If `outputs` isn't (N, B), is empty, or has values that aren't finite.
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> ax = correlation_heat_map([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
        >>> round(ax.images[0].get_array()[0, 1].item(), 6)
        -1.0
    """
    arrays = checked("correlation_heat_map", {"outputs": (outputs, "N B")})
    check_finite("correlation_heat_map", arrays)
    values = arrays["outputs"]
    centred = values - values.mean(1, keepdims=True)
    norms = np.sqrt((centred**2).sum(1, keepdims=True))
    # What is left of a constant after its mean is taken away is rounding, and no direction.
    norms[norms <= 1e-12 * np.abs(values).max(1, keepdims=True) * values.shape[1]] = np.nan
    directions = centred / norms
    return _heat_map(directions @ directions.T, "correlation of two members", title, ax)


def _heat_map(matrix: Array, what: str, title: str, ax: Axes | None) -> Axes:
    """Cells of all pairs with a scale of colours beside; the diagonal is left out of the scale."""
    # Cells are square: the constrained layout takes the room beside them for used, and cuts labels.
    ax = axes_for(ax, title, size=(5.8, 4.9), layout="compressed")
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    n = len(matrix)
    shown = np.ma.masked_invalid(matrix)
    shown[np.diag_indices(n)] = np.ma.masked
    known = shown.compressed()
    low, high = (known.min(), known.max()) if len(known) else (0.0, 1.0)
    if high - low < 1e-9:  # one value has no scale
        low, high = low - 0.5, high + 0.5
    colours = colormaps["viridis"].with_extremes(bad="#CCCCCC")
    image = ax.imshow(shown, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    if n <= _MOST_NUMBERS:
        for i, j in zip(*np.nonzero(~np.ma.getmaskarray(shown)), strict=True):
            dark = matrix[i, j] < (low + high) / 2
            number = f"{matrix[i, j]:.2f}".replace("0.", ".", 1)
            ax.text(j, i, number, ha="center", va="center", fontsize=8, color="w" if dark else "k")
    ax.figure.colorbar(image, ax=ax, label=what)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    ax.set_xlabel("member")
    ax.set_ylabel("member")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return ax
