"""Plots of trainings: losses over the epochs, scores over a hyperparameter."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from unisono.plots.arrays import Array, Values, checked
from unisono.plots.figure import BLACK, BLUE, MOST_LINES, VERMILLION, axes_for, faintness, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curves(
    loss: Values,
    *,
    validation_loss: Values | None = None,
    combined_loss: Values | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw losses over the epochs: a thin line for each member, a thick one for their mean.

    More than fifty members are the band between the lowest and the highest.

    Args:
        loss: Training losses; NaN where a member had stopped.
        validation_loss: Validation losses, likewise.
        combined_loss: Validation loss of the combined prediction.
        title: A line above.
        ax: Where to draw; None for a new figure, ``.figure`` of what is returned.

    Returns:
        The axes.

    Shape:
        - loss, validation_loss: (epochs, N)
        - combined_loss: (epochs,)

    Raises:
        ValueError: If the shapes don't fit together.
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> ax = learning_curves(np.exp(-np.arange(20.0))[:, None] + np.ones((20, 3)))
        >>> ax.get_xlabel()
        'epoch'
    """
    arrays = checked(
        "learning_curves",
        {
            "loss": (loss, "epochs N"),
            "validation_loss": (validation_loss, "epochs N"),
            "combined_loss": (combined_loss, "epochs"),
        },
    )
    ax = axes_for(ax, title)
    from matplotlib.ticker import MaxNLocator

    _members(ax, arrays["loss"], BLUE, "-", "training")
    if "validation_loss" in arrays:
        _members(ax, arrays["validation_loss"], VERMILLION, "--", "validation")
    if "combined_loss" in arrays:
        combined = arrays["combined_loss"]
        label = "validation, combined prediction"
        epochs = np.arange(1, len(combined) + 1)
        marker = "s" if len(combined) == 1 else None
        ax.plot(epochs, combined, color=BLACK, lw=2, ls=":", marker=marker, label=label)
    ax.set_xlabel("epoch")
    ax.set_ylabel("loss")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    known = np.concatenate([values[np.isfinite(values)] for values in arrays.values()])
    if len(known) and known.min() > 0 and known.max() > 30 * known.min():
        ax.set_yscale("log")
    legend(ax)
    return ax


def sweep(
    values: Values,
    scores: Values,
    *,
    what: str,
    score: str,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw each member's score over the value of a hyperparameter that it was trained with.

    Args:
        values: Of the hyperparameter, one for each member.
        scores: One for each member; NaN leaves it out.
        what: Name of the hyperparameter.
        score: Name of the score; the highest is marked as the best.
        title: A line above.
        ax: Where to draw; None for a new figure, ``.figure`` of what is returned.

    Returns:
        The axes.

    Shape:
        - values, scores: (N,)

    Raises:
        ValueError: If the shapes don't fit together.
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> rates = np.logspace(-4, -1, 5)
        >>> ax = sweep(rates, np.arange(5.0), what="learning rate", score="accuracy")
        >>> ax.get_xscale()
        'log'
    """
    arrays = checked("sweep", {"values": (values, "N"), "scores": (scores, "N")})
    x, y = arrays["values"], arrays["scores"]
    ax = axes_for(ax, title)
    order = np.argsort(x)
    ax.plot(x[order], y[order], color=BLUE, marker="o", ms=4, lw=1)
    if x.min() > 0 and x.max() > 20 * x.min():
        ax.set_xscale("log")
    if np.isfinite(y).any():
        best = int(np.nanargmax(y))
        label = f"best: {y[best]:.4g} at {x[best]:.3g}"
        ax.plot(x[best], y[best], color=VERMILLION, marker="D", ms=7, ls="", label=label)
        legend(ax)
    ax.set_xlabel(what, parse_math=False)
    ax.set_ylabel(score, parse_math=False)
    return ax


def _members(ax: Axes, values: Array, color: str, style: str, name: str) -> None:
    """The members' lines, or the band they fill if there are many, and their mean."""
    values = np.where(np.isfinite(values), values, np.nan)
    epochs = np.arange(1, len(values) + 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Mean of empty slice|All-NaN)")
        mean, low, high = (f(values, axis=1) for f in (np.nanmean, np.nanmin, np.nanmax))
    marker = "o" if len(values) == 1 else None
    count = values.shape[1]
    if count > MOST_LINES:
        ax.fill_between(epochs, low, high, color=color, alpha=0.15, lw=0)
    elif count > 1:
        ax.plot(epochs, values, color=color, lw=0.7, alpha=faintness(count), marker=marker)
    of = "the members that train" if np.isnan(values).any() else f"{count} members"
    label = f"{name}, mean of {of}" if count > 1 else name
    ax.plot(epochs, mean, color=color, lw=2, ls=style, marker=marker, label=label)
