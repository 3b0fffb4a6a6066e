"""The table of scores: members and ensemble, with intervals over the test rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from unisono.plots.arrays import Array
from unisono.plots.reliability import bin_answers
from unisono.report.intervals import Interval, bootstrap_means, percentile_interval, wilson

_BINS: Final = 15
# Means over rows -> scores, one for each model.
Formula: TypeAlias = Callable[[Mapping[str, Array]], Array]


@dataclass(frozen=True)
class Column:
    """One score.

    Args:
        name: What it is called.
        better: ``"high"``, ``"low"``, or a value that is the best.
        share: Whether it is a share of the rows, to be told in percent.
    """

    name: str
    better: str
    share: bool = False


@dataclass(frozen=True)
class ScoreTable:
    """Scores of models.

    Args:
        columns: What is measured.
        rows: Name of the model -> one score for each column; the ensemble comes first.
        difference: Ensemble minus mean of the members; empty if there is one member.
        members: Name of the member -> its scores; empty if there is one.
    """

    columns: tuple[Column, ...]
    rows: Mapping[str, tuple[Interval, ...]]
    difference: tuple[Interval, ...]
    members: Mapping[str, tuple[Interval, ...]]


def score_classification(log_p: Array, targets: Array, members: Sequence[int]) -> ScoreTable:
    """Accuracy, negative log-likelihood, Brier score and calibration error.

    The ensemble's probabilities are the mean of the members'.

    Args:
        log_p: Logarithms of the members' probabilities.
        targets: The true classes.
        members: The members' numbers.

    Shape:
        - log_p: (N, B, C)
        - targets: (B,)
    """
    n, rows = log_p.shape[:2]
    models = [np.logaddexp.reduce(log_p, axis=0) - np.log(n), *log_p]  # no probability becomes 0
    true = np.arange(rows), targets
    right, surprise, brier, errors = [], [], [], []
    for own in models:
        p = np.exp(own)
        right.append(own.argmax(-1) == targets)
        surprise.append(-own[true])
        brier.append((p**2).sum(-1) - 2 * p[true] + 1)  # sum_c (p_c - [c is true])^2
        errors.append(bin_answers(p, targets, _BINS).error)
    per_row = {
        "right": np.stack(right).astype(np.float64),
        "surprise": np.stack(surprise),
        "brier": np.stack(brier),
    }
    columns: dict[Column, Formula] = {
        Column("accuracy", "high", share=True): lambda means: means["right"],
        Column("NLL (nats)", "low"): lambda means: means["surprise"],
        Column("Brier", "low"): lambda means: means["brier"],
    }
    table = _tabulate(per_row, columns, members)
    return _with_column(table, Column("ECE", "low"), errors)


def score_regression(
    mean: Array, log_variance: Array | None, targets: Array, members: Sequence[int]
) -> ScoreTable:
    """Root mean square error, mean absolute error, R2; with variances likelihood and coverage.

    The ensemble's mean is the mean of the members', its density the mixture of the members'
    Gaussians, and its interval that of a Gaussian with the mixture's variance.

    Args:
        mean: Of the members.
        log_variance: Of the members; None if they predict a number only.
        targets: The true values.
        members: The members' numbers.

    Shape:
        - mean, log_variance: (N, B)
        - targets: (B,)
    """
    n = len(mean)
    models = np.concatenate([mean.mean(0, keepdims=True), mean])
    errors = models - targets
    # From the mean: sums of squares of large targets would lose their digits.
    spread = targets - targets.mean()
    per_row = {
        "square": errors**2,
        "absolute": np.abs(errors),
        "spread": spread[None],
        "spread2": spread[None] ** 2,
    }
    columns: dict[Column, Formula] = {
        Column("RMSE", "low"): lambda means: np.sqrt(means["square"]),
        Column("MAE", "low"): lambda means: means["absolute"],
        Column("R²", "high"): _explained,
    }
    if log_variance is not None:
        variance = np.exp(log_variance)
        own = 0.5 * (np.log(2 * np.pi) + log_variance + (mean - targets) ** 2 / variance)
        together = np.log(n) - np.logaddexp.reduce(-own, axis=0)
        per_row["surprise"] = np.concatenate([together[None], own])
        total = variance.mean(0) + mean.var(0)
        width = 1.959964 * np.sqrt(np.concatenate([total[None], variance]))
        per_row["covered"] = (np.abs(errors) <= width).astype(np.float64)
        columns[Column("NLL (nats)", "low")] = lambda means: means["surprise"]
        coverage = Column("in the 95 % interval", "95 %", share=True)
        columns[coverage] = lambda means: means["covered"]
    return _tabulate(per_row, columns, members)


def _explained(means: Mapping[str, Array]) -> Array:
    """R2, ``1 - mean squared error / variance of the targets``; NaN if they are all one number."""
    variance = means["spread2"] - means["spread"] ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(variance > 0, 1 - means["square"] / variance, np.nan)


def _tabulate(
    per_row: Mapping[str, Array], columns: Mapping[Column, Formula], members: Sequence[int]
) -> ScoreTable:
    """Scores of the ensemble, the members' mean, the gain over it, and of each member.

    Args:
        per_row: Name -> values of each row, (1 + N, B), the ensemble's first, or (1, B).
        columns: The scores as formulas of the means of these values.
        members: Their numbers.
    """
    n = len(members)
    sizes = np.cumsum([len(values) for values in per_row.values()])[:-1]
    stacked = np.concatenate(list(per_row.values()))
    rows = stacked.shape[1]
    drawn = bootstrap_means(stacked)
    parts = dict(zip(per_row, np.split(drawn, sizes, axis=1), strict=True))
    exact = {name: values.mean(1) for name, values in per_row.items()}
    found: list[list[Interval]] = [[] for _ in range(3 + n)]
    for column, formula in columns.items():
        score, draws = formula(exact), formula(parts)  # (1 + N,), (1000, 1 + N)
        models = [
            wilson(float(score[k]), rows)
            if column.share
            else percentile_interval(float(score[k]), draws[:, k])
            for k in range(1 + n)
        ]
        average, averages = float(score[1:].mean()), draws[:, 1:].mean(1)
        gain = percentile_interval(float(score[0]) - average, draws[:, 0] - averages)
        middle = [percentile_interval(average, averages), gain]
        for line, interval in zip(found, [models[0], *middle, *models[1:]], strict=True):
            line.append(interval)
    return _name_rows(tuple(columns), [tuple(line) for line in found], members)


def _name_rows(
    columns: tuple[Column, ...], lines: list[tuple[Interval, ...]], members: Sequence[int]
) -> ScoreTable:
    if len(members) == 1:  # the ensemble is the member
        return ScoreTable(columns, {"the one member": lines[0]}, (), {})
    rows = {"ensemble": lines[0], "mean of the members": lines[1]}
    own = {f"member {i}": line for i, line in zip(members, lines[3:], strict=True)}
    return ScoreTable(columns, rows, lines[2], own)


def _with_column(table: ScoreTable, column: Column, scores: list[float]) -> ScoreTable:
    """Add a score that has no interval; the ensemble's comes first."""
    average = float(np.mean(scores[1:]))
    found = [Interval(value, math.nan, math.nan) for value in (scores[0], average, *scores[1:])]
    rows = {
        name: (*line, own) for (name, line), own in zip(table.rows.items(), found, strict=False)
    }
    members = {
        name: (*line, own)
        for (name, line), own in zip(table.members.items(), found[2:], strict=False)
    }
    difference = table.difference
    if difference:
        difference = (*difference, Interval(scores[0] - average, math.nan, math.nan))
    return ScoreTable((*table.columns, column), rows, difference, members)
