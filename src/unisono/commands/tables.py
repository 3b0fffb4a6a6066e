"""What the commands print: tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from unisono.commands.metrics import Scores

_NOTE = (
    "NLL: negative log-likelihood per {}, in nats; for the vote, of the shares of the "
    "votes with one more, even vote"
)


def score_table(
    title: str,
    accuracy: Scores,
    nll: Scores,
    *,
    rates: Sequence[float] | None = None,
    of: str = "image",
) -> Table:
    """Lay out the scores: every member, their mean, and the ensemble in both ways.

    Args:
        title: A line above the table.
        accuracy: Parts of 1.
        nll: Nats.
        rates: The members' learning rates, if they are to be told.
        of: What was answered, for the note below.

    Returns:
        The table, 80 columns wide at most.
    """
    note = _NOTE.format(of)
    table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("NLL", justify="right")
    for i, (right, surprise) in enumerate(zip(accuracy.members, nll.members, strict=True)):
        last = i == len(accuracy.members) - 1
        name = f"member {i}" if rates is None else f"member {i}, lr {rates[i]:.3g}"
        table.add_row(name, _percent(right), f"{surprise:.4f}", end_section=last)
    rows = [
        ("mean of the members", accuracy.mean_member, nll.mean_member),
        ("ensemble, mean probability", accuracy.mean_probability, nll.mean_probability),
        ("ensemble, vote", accuracy.vote, nll.vote),
    ]
    for name, right, surprise in rows:
        style = "bold" if name.startswith("ensemble") else ""
        table.add_row(name, _percent(right), f"{surprise:.4f}", style=style)
    return table


def bench_table(title: str, option: dict[str, Any]) -> Table:
    """Lay out the times of one option of the tutorial, one row per way to run it.

    Args:
        title: A line above the table.
        option: One entry of ``options`` of the report of ``unisono.commands.bench``.

    Returns:
        The table, 80 columns wide at most.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("median", "IQR", "loop / this", "vmap / this"):
        table.add_column(name, justify="right")
    for name, seconds in option["seconds"].items():
        ratios = [
            option["ratios"].get(f"{other} / {name}", {}).get("of_medians", 1.0)
            for other in ("without vmap", "with vmap")
        ]
        table.add_row(
            name,
            format_seconds(seconds["median"]),
            format_seconds(seconds["iqr"]),
            *(f"{ratio:.2f}" for ratio in ratios),
            style="bold" if name == "with unisono" else "",
        )
    return table


def format_seconds(seconds: float) -> str:
    """Return a time with three digits and a fitting unit.

    Example:
        >>> format_seconds(0.00123456), format_seconds(12.0)
        ('1.23 ms', '12 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _percent(part: float) -> str:
    return f"{part:.2%}".replace("%", " %")
