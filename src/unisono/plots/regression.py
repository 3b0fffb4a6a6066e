"""Plots of regressions: the band around a curve, and predictions against what is true."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from unisono.plots.arrays import Array, Values, check_finite, checked
from unisono.plots.figure import BLACK, BLUE, GREY, ORANGE, VERMILLION, axes_for, faintness, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_BARS: Final = 200
_WIDTH: Final = 2.0
_TOLD: Final = "±2 standard deviations"


def regression_band(
    x: Values,
    mean: Values,
    variance: Values | None = None,
    *,
    data: tuple[Values, Values] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw the ensemble's curve of one input with the bands of its uncertainty, and data.

    The band of the members' disagreement is ``±2 sqrt(var_i mean_i)``, that of everything
    ``±2 sqrt(var_i mean_i + mean_i variance_i)``.

    Args:
        x: The input, in any order.
        mean: Each member's prediction.
        variance: The noise that each member expects; None if members predict a number only.
        data: Inputs and targets of the data to draw as points.
        title: A line above.
        ax: Where to draw; None for a new figure, ``.figure`` of what is returned.

    Returns:
        The axes.

    Shape:
        - x: (B,)
        - mean, variance: (N, B)
        - data: two of (n,)

    Raises:
        ValueError: If the shapes don't fit together, or values aren't finite or a variance is
            negative.
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> x = np.linspace(0, 1, 50)
        >>> ax = regression_band(x, [x, 2 * x, 3 * x], data=([0.5], [1.0]))
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['epistemic, ±2 standard deviations', '3 members', 'their mean', 'data']

    Reference:
        Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep
        ensembles", NeurIPS 2017.
    """
    call = "regression_band"
    inputs_of_data, targets_of_data = (None, None) if data is None else data
    arrays = checked(
        call,
        {
            "x": (x, "B"),
            "mean": (mean, "N B"),
            "variance": (variance, "N B"),
            "data[0]": (inputs_of_data, "n"),
            "data[1]": (targets_of_data, "n"),
        },
    )
    check_finite(call, arrays)
    order = np.argsort(arrays["x"], kind="stable")
    inputs, members = arrays["x"][order], arrays["mean"][:, order]
    noise = _noise(call, arrays.get("variance"))
    ax = axes_for(ax, title)
    n, middle = len(members), members.mean(0)
    epistemic = members.var(0)
    if noise is not None:
        wide = _WIDTH * np.sqrt(epistemic + noise[order])
        label = f"total, {_TOLD}"
        ax.fill_between(
            inputs, middle - wide, middle + wide, fc="#F3D9A4", ec=ORANGE, lw=0.8, label=label
        )
    if n > 1:
        wide = _WIDTH * np.sqrt(epistemic)
        label = f"epistemic, {_TOLD}"
        ax.fill_between(
            inputs, middle - wide, middle + wide, fc="#A6CBE3", ec=BLUE, lw=0.8, label=label
        )
        ax.plot(inputs, members.T, color=BLUE, lw=0.6, alpha=faintness(n))
        ax.plot([], [], color=BLUE, lw=0.6, alpha=0.6, label=f"{n} members")
    ax.plot(inputs, middle, color=BLACK, lw=2, label="their mean" if n > 1 else "prediction")
    if "data[0]" in arrays:
        points: dict[str, Any] = {"s": 12, "color": VERMILLION, "ec": "white", "lw": 0.4}
        ax.scatter(arrays["data[0]"], arrays["data[1]"], label="data", zorder=3, **points)
    ax.set_xlabel("input")
    ax.set_ylabel("prediction")
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.3 * (top - bottom))  # room for the legend: data fill the rest
    legend(ax, loc="upper left", columns=2)
    return ax


def predicted_against_true(
    mean: Values,
    targets: Values,
    variance: Values | None = None,
    *,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw the ensemble's predictions over the true values, with the line where both are equal.

    Up to 200 rows have bars of two standard deviations of the total uncertainty.

    Args:
        mean: Each member's prediction.
        targets: The true values.
        variance: The noise that each member expects; None if members predict a number only.
        title: A line above.
        ax: Where to draw; None for a new figure, ``.figure`` of what is returned.

    Returns:
        The axes.

    Shape:
        - mean, variance: (N, B)
        - targets: (B,)

    Raises:
        ValueError: If the shapes don't fit together, or values aren't finite or a variance is
            negative.
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> ax = predicted_against_true([[1.0, 2.0], [1.2, 1.8]], [1.0, 2.0])
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('true value', 'prediction')
    """
    call = "predicted_against_true"
    arrays = checked(
        call, {"mean": (mean, "N B"), "targets": (targets, "B"), "variance": (variance, "N B")}
    )
    check_finite(call, arrays)
    members, truth = arrays["mean"], arrays["targets"]
    noise = _noise(call, arrays.get("variance"))
    ax = axes_for(ax, title, size=(5.6, 5.2))
    middle = members.mean(0)
    spread = members.var(0) + (0 if noise is None else noise)
    low, high = min(truth.min(), middle.min()), max(truth.max(), middle.max())
    ax.plot([low, high], [low, high], color=GREY, ls=":", lw=1.5, label="equal", zorder=3)
    if len(truth) <= _MOST_BARS and spread.any():
        name = "total" if noise is not None else "epistemic"
        bars: dict[str, Any] = {"fmt": "none", "ecolor": "#A6CBE3", "elinewidth": 1}
        label = f"{name}, {_TOLD}"
        ax.errorbar(truth, middle, yerr=_WIDTH * np.sqrt(spread), label=label, **bars)
    alpha = 0.8 if len(truth) <= 1000 else 0.25
    label = "1 row" if len(truth) == 1 else f"{len(truth):,} rows"
    ax.scatter(truth, middle, s=12, color=BLUE, alpha=alpha, lw=0, label=label, zorder=2.5)
    ax.set_xlabel("true value")
    ax.set_ylabel("prediction")
    legend(ax)
    return ax


def _noise(call: str, variance: Array | None) -> Array | None:
    """The members' mean variance, (B,)."""
    if variance is None:
        return None
    if variance.min() < 0:
        first = tuple(int(i) for i in np.argwhere(variance < 0)[0])
        raise ValueError(
            f"plots.{call}: variance must be 0 or more, got {variance[first]:.4g} at {first}; of "
            "log-variances write `log_variance.exp()`"
        )
    mean: Array = variance.mean(0)
    return mean
