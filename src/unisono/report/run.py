"""What a report is about, and what has to be true of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from unisono.plots.arrays import Array

Task = Literal["classification", "regression"]
_PLAN: Final = {"strategy", "chunk_size", "reason", "candidates", "ops"}


@dataclass(frozen=True, eq=False)
class Run:
    """A training, its settings, and what every member says about the test rows.

    Args:
        name: Of the run, for the headline.
        task: ``"classification"`` or ``"regression"``.
        outputs: Logits; for regression mean and log-variance, or the mean alone.
        targets: Index of the true class; for regression the true value.
        rows: What each test row is called in the data.
        classes: Names of the classes, in the order of the logits; numbers if there are none.
        settings: Name -> value, in the order to show.
        columns: For each column of a table its kind and more, name -> value.
        target: Name of what is predicted.
        loss: Training losses; None if the run kept none.
        validation_loss: Validation losses, likewise.
        combined_loss: Validation loss of the combined prediction, likewise.
        plan: How the members run, as of `Plan.to_dict`.
        images: The test rows as pictures in grey or in colour, from 0 to 255.
        table: The test rows as they stood in the file, a `pyarrow.Table`.

    Shape:
        - outputs: (N, B, C), or (N, B, 2), or (N, B, 1)
        - targets, rows: (B,)
        - loss, validation_loss: (epochs, N)
        - combined_loss: (epochs,)
        - images: (B, 1 or 3, height, width)

    Raises:
        ValueError: If the shapes don't fit together, there is no row or no member, or the targets
            are no classes or not finite.

    Example:
        >>> outputs = np.random.default_rng(0).normal(size=(4, 50, 3))
        >>> run = Run("demo", "classification", outputs, np.arange(50) % 3, np.arange(50))
        >>> run.class_names
        ('0', '1', '2')
    """

    name: str
    task: Task
    outputs: Array
    targets: Array
    rows: Array
    classes: Sequence[object] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    columns: Sequence[Mapping[str, Any]] = ()
    target: str = ""
    loss: Array | None = None
    validation_loss: Array | None = None
    combined_loss: Array | None = None
    plan: Mapping[str, Any] | None = None
    images: Array | None = None
    table: Any = None

    def __post_init__(self) -> None:
        """Check everything that the report relies on."""
        wrong = [*_shapes(self), *_values(self)]
        if wrong:
            raise ValueError(f"the run {self.name} can't be reported on: " + "; ".join(wrong))

    @property
    def class_names(self) -> tuple[str, ...]:
        """A name for each class."""
        named = self.classes or range(self.outputs.shape[-1])
        return tuple(str(name) for name in named)


def _shapes(run: Run) -> list[str]:
    shape = np.shape(run.outputs)
    if len(shape) != 3 or 0 in shape:
        return [f"outputs must be (members, rows, outputs), none of them 0, got {shape}"]
    rows = shape[1]
    wrong = [
        f"{name} must be ({rows},) as there are outputs of {rows} rows, got {np.shape(values)}"
        for name, values in (("targets", run.targets), ("rows", run.rows))
        if np.shape(values) != (rows,)
    ]
    if run.task == "classification" and shape[2] < 2:
        wrong.append("a classification has two outputs at least, got 1")
    if run.task == "classification" and run.classes and len(run.classes) != shape[2]:
        wrong.append(f"{len(run.classes)} classes are named, but outputs have {shape[2]}")
    if run.task == "regression" and shape[2] > 2:
        wrong.append(f"a regression has a mean and a log-variance, got {shape[2]} outputs")
    if run.images is not None and (
        run.images.ndim != 4 or len(run.images) != rows or run.images.shape[1] not in (1, 3)
    ):
        wrong.append(f"images must be ({rows}, 1 or 3, height, width), got {run.images.shape}")
    missing = _PLAN - set(run.plan) if run.plan is not None else set()
    if missing:
        wrong.append(f"the plan has no {', '.join(sorted(missing))}")
    if run.table is not None and run.table.num_rows != rows:
        wrong.append(f"the table has {run.table.num_rows} rows, but there are outputs of {rows}")
    return wrong


def _values(run: Run) -> list[str]:
    if run.task not in ("classification", "regression"):
        return [f"task must be classification or regression, got {run.task!r}"]
    if run.task == "regression":
        finite = np.isfinite(run.targets).all()
        return [] if finite else ["targets must be finite"]
    classes = np.shape(run.outputs)[-1]
    if np.size(run.targets) and not 0 <= np.min(run.targets) <= np.max(run.targets) < classes:
        found = f"{np.min(run.targets)} to {np.max(run.targets)}"
        return [f"targets must be from 0 to {classes - 1}, got {found}"]
    return []
