"""What `evaluate` returns: numbers for each member and for all together, as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Task = Literal["classification", "regression"]


@dataclass(frozen=True, eq=False)
class OutOfDistribution:
    """How well uncertainty tells rows of another distribution from those of the data.

    ``auroc == P(uncertainty of a row outside > that of a row inside)``: 0.5 is guessing, 1 perfect.

    Args:
        auroc: By the ``"total"``, ``"aleatoric"`` and ``"epistemic"`` uncertainty of all together.
        members: By what each member states by itself, its entropy or its variance; None if it
            states nothing.
        uncertainty: Mean uncertainty of the rows outside, as in `Evaluation`.
        rows: The number of rows outside.

    Shape:
        - members: (N)
    """

    auroc: Mapping[str, float]
    members: Array | None
    uncertainty: Mapping[str, float]
    rows: int


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How good the members are, each by itself and together. It prints as a table.

    Args:
        task: ``"classification"`` or ``"regression"``.
        rows: The number of rows.
        members: Metric -> each member's value.
        combined: Metric -> the value of the combined prediction.
        uncertainty: Mean ``"total"``, ``"aleatoric"`` and ``"epistemic"`` uncertainty: entropies in
            nats, or variances in squared units of the targets.
        out_of_distribution: None without such data.

    Shape:
        - each of members: (N)

    Example:
        >>> import torch
        >>> from unisono import Ensemble, evaluate
        >>> ens = Ensemble.build(lambda: torch.nn.Linear(3, 2), 4)
        >>> data = torch.randn(20, 3), torch.randint(2, (20,))
        >>> evaluation = evaluate(ens, data, task="classification")
        >>> evaluation.members["accuracy"].shape, sorted(evaluation.combined)
        ((4,), ['accuracy', 'brier', 'ece', 'nll'])
    """

    task: Task
    rows: int
    members: Mapping[str, Array]
    combined: Mapping[str, float]
    uncertainty: Mapping[str, float]
    out_of_distribution: OutOfDistribution | None = None

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers, ready for JSON; None stands for what isn't finite."""
        outside = self.out_of_distribution
        return {
            "task": self.task,
            "rows": self.rows,
            "members": {name: _plain(values) for name, values in self.members.items()},
            "combined": _plain_each(self.combined),
            "uncertainty": _plain_each(self.uncertainty),
            "out_of_distribution": None
            if outside is None
            else {
                "auroc": _plain_each(outside.auroc),
                "members": None if outside.members is None else _plain(outside.members),
                "uncertainty": _plain_each(outside.uncertainty),
                "rows": outside.rows,
            },
        }

    def __repr__(self) -> str:
        """The combined prediction, in one line."""
        found = ", ".join(f"{name}={_short(value)}" for name, value in self.combined.items())
        return f"Evaluation({self.task}, {self._size()} members, {self.rows} rows: {found})"

    def __str__(self) -> str:
        """A table of all metrics."""
        head = ("", "members: mean", "lowest", "highest", "combined")
        rows = [head] + [
            (name, *_spread(values), _short(self.combined[name]))
            for name, values in self.members.items()
        ]
        parts = [
            f"Evaluation of {self._size()} members on {self.rows:,} rows, {self.task}",
            "",
            *_aligned(rows),
            "",
            f"mean uncertainty: {_sum(self.uncertainty)}",
        ]
        if (outside := self.out_of_distribution) is not None:
            parts += ["", *_about(outside)]
        return "\n".join(parts)

    def _size(self) -> int:
        return max((len(values) for values in self.members.values()), default=0)


def _about(outside: OutOfDistribution) -> list[str]:
    own = []
    if outside.members is not None:
        own = [("of a member by itself", *_spread(outside.members), "")]
    rows = [("AUROC by uncertainty", "members: mean", "lowest", "highest", "combined"), *own]
    rows += [(name, "", "", "", _short(value)) for name, value in outside.auroc.items()]
    return [
        f"against {outside.rows:,} rows of another distribution",
        "",
        *_aligned(rows),
        "",
        f"mean uncertainty there: {_sum(outside.uncertainty)}",
    ]


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _sum(parts: Mapping[str, float]) -> str:
    total, aleatoric, epistemic = (
        _short(parts[name]) for name in ("total", "aleatoric", "epistemic")
    )
    return f"total {total} = aleatoric {aleatoric} + epistemic {epistemic}"


def _spread(values: Array) -> tuple[str, str, str]:
    known = values[~np.isnan(values)]
    if not len(known):
        return "nan", "nan", "nan"
    # The mean is that of all members, so a NaN among them shows.
    return _short(values.mean()), _short(known.min()), _short(known.max())


def _short(value: float) -> str:
    return f"{value:.4g}"


def _plain(values: Array) -> list[float | None]:
    return [float(value) if math.isfinite(value) else None for value in values]


def _plain_each(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
