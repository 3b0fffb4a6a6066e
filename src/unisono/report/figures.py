"""The pictures of a report, each as text that an ``<img>`` takes."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from unisono import plots
from unisono.plots.arrays import Array
from unisono.plots.figure import Layout, new_axes
from unisono.report.answers import Answers
from unisono.report.run import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_ROWS: Final = 20_000


@dataclass(frozen=True)
class Picture:
    """A plot in a report.

    Args:
        title: A headline.
        source: The PNG as a data URI.
        text: What it shows, for those who don't see it.
        caption: How to read it.
    """

    title: str
    source: str
    text: str
    caption: str


def draw(run: Run, answers: Answers) -> list[Picture]:
    """All plots that the run has the data for; of at most 20,000 rows, drawn at random."""
    keep = _some_rows(len(run.targets))
    targets = np.asarray(run.targets)[keep]
    found = [*_learning(run)]
    if answers.log_p is not None:
        found += _classification(np.exp(answers.log_p[:, keep]), targets, answers, keep)
    elif answers.mean is not None:
        noise = None if answers.log_variance is None else np.exp(answers.log_variance[:, keep])
        found += _regression(answers.mean[:, keep], noise, targets, answers.total[keep])
    return found


def data_uri(content: bytes) -> str:
    """A PNG file as text that stands for an address."""
    return f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"


def _learning(run: Run) -> Iterator[Picture]:
    if run.loss is None or not len(run.loss):
        return
    yield _picture(
        "Learning curves",
        plots.learning_curves(
            run.loss,
            validation_loss=run.validation_loss,
            combined_loss=run.combined_loss,
            ax=_axes(),
        ),
        f"Losses of {run.loss.shape[1]} members over {len(run.loss)} epochs",
        "Thin lines are members, thick ones means. Where a line ends, the member had stopped.",
    )


def _classification(p: Array, targets: Array, answers: Answers, keep: Array) -> Iterator[Picture]:
    combined = answers.prediction[keep]
    yield _picture(
        "Reliability",
        plots.reliability_diagram(p, targets, combined=combined, bins=15, ax=_axes()),
        "Share of right answers over the probability they are given with",
        "On the dotted line, answers with a probability of 80 % are right in 80 % of the cases. "
        "Below it the model is too sure of itself, above it not sure enough.",
    )
    yield from _by_size(
        p, "accuracy", lambda some: float((some.mean(0).argmax(-1) == targets).mean())
    )
    if len(p) > 1:
        yield _picture(
            "Disagreement",
            plots.disagreement_heat_map(p.argmax(-1), ax=_axes("compressed")),
            f"On how many rows every two of {len(p)} members disagree",
            "Members that never disagree add nothing to each other.",
        )
    right = combined.argmax(-1) == targets
    if right.any() and not right.all():
        doubt = answers.total[keep]
        yield _picture(
            "Uncertainty of right and wrong answers",
            plots.uncertainty_histogram(
                doubt[right],
                doubt[~right],
                names=("right answers", "wrong answers"),
                what="total uncertainty (nats)",
                ax=_axes(),
            ),
            "Histogram of the uncertainty of right and of wrong answers",
            "AUROC: how often a wrong answer is more uncertain than a right one; 0.5 is chance.",
        )


def _regression(
    mean: Array, noise: Array | None, targets: Array, doubt: Array
) -> Iterator[Picture]:
    yield _picture(
        "Predictions against true values",
        plots.predicted_against_true(mean, targets, noise, ax=_axes()),
        "Predictions of the ensemble over the true values",
        "On the dotted line a prediction is right.",
    )
    yield from _by_size(
        mean, "RMSE", lambda some: float(np.sqrt(((some.mean(0) - targets) ** 2).mean()))
    )
    if len(mean) > 1:
        yield _picture(
            "Correlation of errors",
            plots.correlation_heat_map(mean - targets, ax=_axes("compressed")),
            f"Correlation of the errors of every two of {len(mean)} members",
            "What members get wrong together doesn't average out.",
        )
    errors = np.abs(mean.mean(0) - targets)
    large = errors > np.median(errors)
    if large.any() and doubt.any():
        yield _picture(
            "Uncertainty of small and large errors",
            plots.uncertainty_histogram(
                doubt[~large],
                doubt[large],
                names=("smaller errors", "larger errors"),
                what="total uncertainty (standard deviation)",
                ax=_axes(),
            ),
            "Histogram of the uncertainty of the rows with small and with large errors",
            "AUROC: how often a row with an error above the median is more uncertain than one "
            "below; 0.5 is chance.",
        )


def _by_size(outputs: Array, what: str, score: Callable[[Array], float]) -> Iterator[Picture]:
    if len(outputs) == 1:
        return
    found = plots.subset_scores(outputs, score)
    yield _picture(
        f"{what[0].upper()}{what[1:]} by number of members",
        plots.score_by_size(*found, what=what, ax=_axes()),
        f"{what} of ensembles of 1 to {len(outputs)} members",
        "Ensembles of some of the members, drawn at random.",
    )


def _axes(layout: Layout = "constrained") -> Axes:
    """Small and of many pixels: letters are readable on a phone, and sharp on paper."""
    return new_axes(size=(5.2, 4.2), layout=layout, dpi=160)


def _picture(title: str, ax: Axes, text: str, caption: str) -> Picture:
    return Picture(title, data_uri(plots.to_png(ax)), text, caption)


def _some_rows(rows: int) -> Array:
    if rows <= MOST_ROWS:
        return np.arange(rows)
    return np.sort(np.random.default_rng(0).choice(rows, MOST_ROWS, replace=False))
