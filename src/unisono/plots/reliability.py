"""The reliability diagram: whether a probability of 80 % is right in 80 % of the cases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from unisono.plots.arrays import Array, Values, check_finite, checked
from unisono.plots.figure import BLACK, BLUE, GREY, axes_for, faintness, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CALL: Final = "reliability_diagram"
_STRIP: Final = 0.18  # part of the axes' height that shows the counts


class AnswerBins(NamedTuple):
    """The answers of one classifier, put into bins of equal width by their probability."""

    counts: Array  # (bins,)
    confidence: Array  # (bins,) mean probability, NaN where a bin is empty
    accuracy: Array  # (bins,) share of right answers, likewise

    @property
    def error(self) -> float:
        """Expected calibration error: the mean over rows of a bin's |accuracy - confidence|."""
        filled = self.counts > 0
        gaps = np.abs(self.accuracy - self.confidence)[filled]
        return float(np.average(gaps, weights=self.counts[filled]))


def reliability_diagram(
    probabilities: Values,
    targets: Values,
    *,
    combined: Values | None = None,
    bins: int = 10,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw how often answers are right over the probability they are given with.

    A row counts for the bin of its largest probability. Members are faint lines, the ensemble is a
    bold one with intervals of 95 %; bars below count the ensemble's rows in each bin. The legend
    tells the expected calibration error, ``ECE = sum_k |accuracy_k - confidence_k| n_k / B``.

    Args:
        probabilities: Of every member.
        targets: The true classes, from 0.
        combined: Probabilities of the ensemble; None for the mean of the members'.
        bins: Number of bins of equal width.
        title: A line above.
        ax: Where to draw; None for a new figure, ``.figure`` of what is returned.

    Returns:
        The axes.

    Shape:
        - probabilities: (N, B, C)
        - targets: (B,)
        - combined: (B, C)

    Raises:
        ValueError: If the shapes don't fit together, the targets are no classes, or a row of
            probabilities doesn't sum to 1.
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> probabilities = np.random.default_rng(0).dirichlet(np.ones(3), size=(4, 100))
        >>> ax = reliability_diagram(probabilities, np.zeros(100, dtype=int))
        >>> ax.get_ylabel()
        'share of right answers'

    Reference:
        Guo et al., "On calibration of modern neural networks", ICML 2017.
    """
    arrays = checked(
        _CALL,
        {
            "probabilities": (probabilities, "N B C"),
            "targets": (targets, "B"),
            "combined": (combined, "B C"),
        },
    )
    members, labels = arrays["probabilities"], arrays["targets"]
    whole = arrays.get("combined", members.mean(0))
    _check(members, labels, whole, bins)
    ax = axes_for(ax, title, size=(5.6, 5.2))
    n = len(members)
    ensemble = bin_answers(whole, labels, bins)
    ax.plot([0, 1], [0, 1], color=GREY, ls=":", lw=1.2, label="ideal")
    if n > 1:
        errors = []
        for own in (bin_answers(member, labels, bins) for member in members):
            errors.append(own.error)
            ax.plot(own.confidence, own.accuracy, color=BLUE, lw=0.9, alpha=faintness(n))
        label = f"{n} members, ECE {np.mean(errors):.3f} on average"
        ax.plot([], [], color=BLUE, lw=0.9, alpha=0.6, label=label)
    name = "ensemble" if n > 1 else "model"
    x, y = ensemble.confidence, ensemble.accuracy
    low, high = wilson_interval(y, ensemble.counts)
    ax.vlines(x, low, high, color=BLACK, lw=0.8, alpha=0.5)
    ax.plot(x, y, color=BLACK, lw=2, marker="o", ms=4, label=f"{name}, ECE {ensemble.error:.3f}")
    ax.set(xlim=(0, 1), ylim=(-_STRIP / (1 - _STRIP) - 0.06, 1.03), yticks=np.linspace(0, 1, 6))
    ax.set_xlabel("probability of the answer")
    ax.set_ylabel("share of right answers")
    legend(ax, bottom=_STRIP + 0.02)
    _draw_counts(ax, ensemble.counts)
    return ax


def _draw_counts(ax: Axes, counts: Array) -> None:
    """A strip of bars along the bottom of the axes, inside of them: any axes have room for it."""
    strip = ax.inset_axes((0, 0, 1, _STRIP))
    edges = np.linspace(0, 1, len(counts) + 1)
    strip.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color="#BBBBBB", ec="white")
    strip.set(xlim=(0, 1), ylim=(0, 1.6 * counts.max()), xticks=[], yticks=[])
    strip.patch.set_visible(False)
    strip.spines[["left", "right", "bottom"]].set_visible(False)
    strip.spines["top"].set_color("#BBBBBB")
    text = f"rows in each bin, at most {counts.max():,}"
    strip.text(0.01, 0.93, text, transform=strip.transAxes, va="top", fontsize=8, color=GREY)


def wilson_interval(share: Array, count: Array) -> tuple[Array, Array]:
    """The ends of Wilson's interval of 95 % of shares of independent rows; right at 0 and 1 too.

    Args:
        share: Shares; NaN has no interval.
        count: Of how many rows each.

    Example:
        >>> low, high = wilson_interval(np.array([0.9]), np.array([100]))
        >>> low.round(3).item(), high.round(3).item()
        (0.826, 0.945)

    Reference:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    z = 1.959964
    extra = z**2 / np.where(np.isnan(share), np.nan, count)
    centre = (share + extra / 2) / (1 + extra)
    half = np.sqrt(share * (1 - share) * extra + extra**2 / 4) / (1 + extra)
    # Rounding must not leave the share outside of its interval.
    return np.minimum(centre - half, share).clip(min=0), np.maximum(centre + half, share).clip(
        max=1
    )


def bin_answers(probabilities: Array, labels: Array, bins: int) -> AnswerBins:
    """Put each row into the bin ``((k - 1) / bins, k / bins]`` of its largest probability."""
    confidence = probabilities.max(-1)  # (B,)
    right = probabilities.argmax(-1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    filled = np.where(counts > 0, counts, np.nan)
    return AnswerBins(
        counts,
        np.bincount(place, weights=confidence, minlength=bins) / filled,
        np.bincount(place, weights=right, minlength=bins) / filled,
    )


def _check(members: Array, labels: Array, whole: Array, bins: int) -> None:
    check_finite(_CALL, {"probabilities": members, "combined": whole})
    if bins < 1:
        raise ValueError(f"plots.{_CALL}: bins must be at least 1, got {bins}")
    classes = members.shape[-1]
    if labels.dtype.kind not in "iub" or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"plots.{_CALL}: targets must be whole numbers from 0 to {classes - 1}, one of the "
            f"{classes} classes, got {labels.dtype} from {labels.min()} to {labels.max()}"
        )
    for name, values in (("probabilities", members), ("combined", whole)):
        sums = values.sum(-1)
        wrong = (np.abs(sums - 1) > 1e-2) | (values.min(-1) < -1e-6)  # float16 sums to 1 so well
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(
                f"plots.{_CALL}: rows of {name} must be 0 or more and sum to 1; row {first} sums "
                f"to {sums[first]:.4g} with the lowest value {values[first].min():.4g}; of logits "
                "write `logits.softmax(-1)`"
            )
