"""Plots of arrays, as Matplotlib figures that are neither shown nor saved."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from unisono.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = np.ndarray[Any, np.dtype[Any]]

# Two colours of the Okabe-Ito palette: apart for every kind of colour blindness and in grey.
_TRAINING: Final = "#0072B2"
_VALIDATION: Final = "#D55E00"
_MOST_LINES: Final = 50


def learning_curves(
    loss: Array,
    *,
    validation_loss: Array | None = None,
    combined_loss: Array | None = None,
    title: str = "",
) -> Figure:
    """Draw losses over the epochs: a thin line for each member, a thick one for their mean.

    Args:
        loss: Training losses; NaN where a member had stopped.
        validation_loss: Validation losses, likewise.
        combined_loss: Validation loss of the combined prediction.
        title: A line above.

    Returns:
        A figure of its own; pyplot knows nothing of it.

    Shape:
        - loss, validation_loss: (epochs, N)
        - combined_loss: (epochs)

    Raises:
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> figure = learning_curves(np.exp(-np.arange(20.0))[:, None] + np.ones((20, 3)))
        >>> figure.axes[0].get_xlabel()
        'epoch'
    """
    figure, axes = _figure(title)
    from matplotlib.ticker import MaxNLocator

    _members(axes, loss, _TRAINING, "training")
    if validation_loss is not None:
        _members(axes, validation_loss, _VALIDATION, "validation")
    if combined_loss is not None:
        epochs = np.arange(1, len(combined_loss) + 1)
        label = "validation, combined prediction"
        axes.plot(epochs, combined_loss, color="black", lw=2, ls="--", label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    shown = [np.asarray(values) for values in (loss, validation_loss) if values is not None]
    known = np.concatenate([values[np.isfinite(values)] for values in shown])
    if len(known) and known.min() > 0 and known.max() > 30 * known.min():
        axes.set_yscale("log")
    axes.legend(frameon=False)
    return figure


def sweep(values: Array, scores: Array, *, what: str, score: str, title: str = "") -> Figure:
    """Draw each member's score over the value of a hyperparameter that it was trained with.

    Args:
        values: Of the hyperparameter, one for each member.
        scores: One for each member; NaN leaves it out.
        what: Name of the hyperparameter.
        score: Name of the score.
        title: A line above.

    Returns:
        A figure of its own; pyplot knows nothing of it.

    Shape:
        - values, scores: (N)

    Raises:
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> rates = np.logspace(-4, -1, 5)
        >>> figure = sweep(rates, np.arange(5.0), what="learning rate", score="accuracy")
        >>> figure.axes[0].get_xscale()
        'log'
    """
    figure, axes = _figure(title)
    order = np.argsort(values)
    axes.plot(values[order], scores[order], color=_TRAINING, marker="o", ms=4, lw=1)
    if values.min() > 0 and values.max() > 20 * values.min():
        axes.set_xscale("log")
    if np.isfinite(scores).any():
        best = int(np.nanargmax(scores))
        label = f"best: {scores[best]:.4g} at {values[best]:.3g}"
        axes.plot(values[best], scores[best], color=_VALIDATION, marker="o", ls="", label=label)
        axes.legend(frameon=False)
    axes.set_xlabel(what)
    axes.set_ylabel(score)
    return figure


def to_png(figure: Figure) -> bytes:
    """Write a figure as a PNG file; the same bytes for the same figure.

    Args:
        figure: A Matplotlib figure.

    Returns:
        The content of the file.

    Example:
        >>> to_png(learning_curves(np.ones((3, 2))))[1:4]
        b'PNG'
    """
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _figure(title: str) -> tuple[Figure, Axes]:
    require("matplotlib", extra="plots", purpose="a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title)
    return figure, axes


def _members(axes: Axes, values: Array, color: str, name: str) -> None:
    """The members' lines, or the band they fill if there are many, and their mean."""
    values = np.where(np.isfinite(values), values, np.nan)
    epochs = np.arange(1, len(values) + 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Mean of empty slice|All-NaN)")
        mean, low, high = (f(values, axis=1) for f in (np.nanmean, np.nanmin, np.nanmax))
    marker = "o" if len(values) == 1 else None
    if values.shape[1] > _MOST_LINES:
        axes.fill_between(epochs, low, high, color=color, alpha=0.15, lw=0)
    else:
        axes.plot(epochs, values, color=color, lw=0.7, alpha=0.35, marker=marker)
    count = values.shape[1]
    of = "the members that train" if np.isnan(values).any() else f"{count} members"
    label = f"{name}, mean of {of}" if count > 1 else name
    axes.plot(epochs, mean, color=color, lw=2, marker=marker, label=label)
