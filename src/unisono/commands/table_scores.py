"""The scores of a run on a table, for people and for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from torch import Tensor

from unisono.commands.metrics import accuracy, negative_log_likelihood
from unisono.commands.regression_metrics import (
    RegressionScores,
    gaussian_nll,
    r_squared,
    root_mean_squared_error,
)
from unisono.commands.tables import score_table


def score(
    task: str, outputs: Tensor, targets: Tensor, *, title: str, rates: Sequence[float] | None
) -> tuple[dict[str, Any], Table]:
    """Score every member and the ensemble on the test rows.

    Args:
        task: ``"classification"`` or ``"regression"``.
        outputs: What `member_outputs` gives.
        targets: Classes as indices, or numbers.
        title: A line above the table.
        rates: The members' learning rates, if they are to be told.

    Returns:
        Name of a score -> its values for JSON, and a table 80 columns wide at most.

    Shape:
        - outputs: ``(N, B, outputs)``
        - targets: ``(B,)``
    """
    if task == "classification":
        right, surprise = accuracy(outputs, targets), negative_log_likelihood(outputs, targets)
        table = score_table(title, right, surprise, rates=rates, of="row")
        return {"accuracy": right.to_json(), "nll": surprise.to_json()}, table
    mean = outputs[..., 0]
    found = {
        "rmse": root_mean_squared_error(mean, targets),
        "r2": r_squared(mean, targets),
    }
    if outputs.shape[-1] == 2:
        found["nll"] = gaussian_nll(mean, outputs[..., 1], targets)
    table = regression_table(title, found, rates=rates)
    return {name: scores.to_json() for name, scores in found.items()}, table


def regression_table(
    title: str, scores: dict[str, RegressionScores], *, rates: Sequence[float] | None = None
) -> Table:
    """Lay out the scores of a regression: every member, their mean, and the ensemble.

    Args:
        title: A line above the table.
        scores: ``rmse`` and ``r2``; ``nll`` if the members predict variances.
        rates: The members' learning rates, if they are to be told.

    Returns:
        The table, 80 columns wide at most.
    """
    names = {"rmse": "RMSE", "r2": "R²", "nll": "NLL"}
    note = "RMSE: root of the mean squared error, in the unit of the target"
    if "nll" in scores:
        note += "; NLL: negative log-likelihood per row, in nats"
    table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
    table.add_column("")
    for name in scores:
        table.add_column(names[name], justify="right")
    members = list(zip(*(own.members for own in scores.values()), strict=True))
    for i, values in enumerate(members):
        label = f"member {i}" if rates is None else f"member {i}, lr {rates[i]:.3g}"
        table.add_row(label, *map(_number, values), end_section=i == len(members) - 1)
    mean = [_number(own.mean_member) for own in scores.values()]
    ensemble = [_number(own.ensemble) for own in scores.values()]
    table.add_row("mean of the members", *mean)
    table.add_row("ensemble", *ensemble, style="bold")
    return table


def _number(value: float) -> str:
    return f"{value:.4f}" if value == 0 or 0.01 <= abs(value) < 1000 else f"{value:.4g}"
