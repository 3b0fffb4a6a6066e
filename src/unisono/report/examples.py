"""The test rows that the ensemble is least sure of."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from unisono.plots.arrays import Array
from unisono.report.answers import Answers
from unisono.report.figures import data_uri
from unisono.report.run import Run
from unisono.report.texts import number

MOST_EXAMPLES: Final = 20
_MOST_COLUMNS: Final = 12


@dataclass(frozen=True)
class Example:
    """One test row.

    Args:
        row: What it is called in the data.
        true: The true class or value.
        predicted: What the ensemble says.
        wrong: Whether that is another class.
        probability: Of the predicted class; None for a regression.
        votes: For each class that a member names, how many do, the most frequent first.
        total, aleatoric, epistemic: The uncertainty.
        image: The row as a picture, a data URI; empty if it is none.
        values: Column -> value, of a table.
    """

    row: str
    true: str
    predicted: str
    wrong: bool
    probability: float | None
    votes: Mapping[str, int]
    total: float
    aleatoric: float
    epistemic: float
    image: str
    values: Mapping[str, Any]


def most_uncertain(run: Run, answers: Answers) -> list[Example]:
    """The rows with the largest total uncertainty; of equal ones the first."""
    order = np.argsort(-answers.total, kind="stable")[:MOST_EXAMPLES]
    values = _values(run, order)
    return [_example(run, answers, int(k), own) for k, own in zip(order, values, strict=True)]


def _example(run: Run, answers: Answers, k: int, values: Mapping[str, Any]) -> Example:
    votes: dict[str, int] = {}
    if answers.log_p is not None:
        names = run.class_names
        p = answers.prediction[k]
        chosen, truth = int(p.argmax()), int(run.targets[k])
        true, predicted = names[truth], names[chosen]
        wrong, probability = chosen != truth, float(p[chosen])
        counts = np.bincount(answers.log_p[:, k].argmax(-1), minlength=len(names))
        votes = {names[c]: int(counts[c]) for c in np.argsort(-counts, kind="stable") if counts[c]}
    else:
        true, predicted = number(run.targets[k]), number(answers.prediction[k])
        wrong, probability = False, None
    return Example(
        row=str(run.rows[k]),
        true=true,
        predicted=predicted,
        wrong=wrong,
        probability=probability,
        votes=votes,
        total=float(answers.total[k]),
        aleatoric=float(answers.aleatoric[k]),
        epistemic=float(answers.epistemic[k]),
        image="" if run.images is None else _png(run.images[k]),
        values=values,
    )


def _values(run: Run, order: Array) -> list[Mapping[str, Any]]:
    """What the first columns of the table hold in some rows."""
    if run.table is None:
        return [{} for _ in order]
    names = [name for name in run.table.column_names if name != run.target][:_MOST_COLUMNS]
    found: list[Mapping[str, Any]] = run.table.select(names).take(order).to_pylist()
    return found


def _png(pixels: Array) -> str:
    """A picture (1 or 3, height, width) from 0 to 255 as a data URI; in grey, ink is dark."""
    from matplotlib.image import imsave

    content = io.BytesIO()
    if len(pixels) == 1:
        imsave(content, pixels[0], format="png", cmap="gray_r", vmin=0, vmax=255)
    else:
        imsave(content, np.ascontiguousarray(pixels.transpose(1, 2, 0)), format="png")
    return data_uri(content.getvalue())
