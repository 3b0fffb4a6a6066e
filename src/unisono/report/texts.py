"""How numbers and settings are told in a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from unisono.report.intervals import Interval
from unisono.report.scores import Column

NOTHING: Final = "\N{EN DASH}"
_MINUS: Final = "\N{MINUS SIGN}"
_MOST_LETTERS: Final = 300
_MOST_IN_CELL: Final = 60
_MOST_VALUES: Final = 12


def number(value: float) -> str:
    """Four significant digits, and a real minus.

    Example:
        >>> number(0.1), number(0.0123456), number(1234567.0), number(float("nan")) == NOTHING
        ('0.1000', '0.01235', '1.235e+06', True)
    """
    if math.isnan(value):
        return NOTHING
    return f"{value:#.4g}".rstrip(".").replace("-", _MINUS)


def percent(value: float) -> str:
    """A share in percent.

    Example:
        >>> percent(0.96234).split()
        ['96.23', '%']
    """
    if math.isnan(value):
        return NOTHING
    return f"{100 * value:.2f}\N{NO-BREAK SPACE}%".replace("-", _MINUS)


def score(interval: Interval, column: Column) -> str:
    """A score.

    Example:
        >>> score(Interval(0.5, 0.4, 0.6), Column("Brier", "low"))
        '0.5000'
    """
    return (percent if column.share else number)(interval.value)


def difference(interval: Interval, column: Column) -> str:
    """By how much two scores differ; shares in percentage points.

    Example:
        >>> difference(Interval(0.05, 0.01, 0.09), Column("accuracy", "high", share=True))
        '+5.00 points'
    """
    sign = "+" if interval.value > 0 else ""
    if column.share and not math.isnan(interval.value):
        return f"{sign}{100 * interval.value:.2f} points".replace("-", _MINUS)
    return f"{sign}{number(interval.value)}"


def ends(interval: Interval, column: Column) -> str:
    """The ends of an interval; empty if there is none.

    Example:
        >>> ends(Interval(0.5, 0.4, 0.6), Column("accuracy", "high", share=True))
        '40.00 to 60.00'
    """
    if math.isnan(interval.low):
        return ""
    low, high = interval.low, interval.high
    if column.share:
        return f"{100 * low:.2f} to {100 * high:.2f}".replace("-", _MINUS)
    return f"{number(low)} to {number(high)}"


def value(found: Any) -> str:
    """A setting or a cell of a table, on one line.

    Example:
        >>> value(True), value([1e-3, 1e-2] * 50), value("a" * 999)[-3:]
        ('yes', '100 values from 0.001 to 0.01', 'aa…')
    """
    if found is None or (isinstance(found, float) and math.isnan(found)):
        return NOTHING
    if isinstance(found, bool):
        return "yes" if found else "no"
    if isinstance(found, float):
        return f"{found:.6g}"
    if isinstance(found, Mapping):
        return _cut(", ".join(f"{name} {value(own)}" for name, own in found.items()) or NOTHING)
    if isinstance(found, Sequence) and not isinstance(found, str | bytes):
        return _listed(found)
    return _cut(str(found))


def cell(found: Any) -> str:
    """The same in at most 60 letters."""
    text = value(found)
    return text if len(text) <= _MOST_IN_CELL else f"{text[: _MOST_IN_CELL - 1]}…"


def _listed(found: Sequence[Any]) -> str:
    if len(found) > _MOST_VALUES and all(isinstance(own, int | float) for own in found):
        return f"{len(found)} values from {value(min(found))} to {value(max(found))}"
    shown = ", ".join(value(own) for own in found[:_MOST_VALUES])
    rest = len(found) - _MOST_VALUES
    return _cut(f"{shown} and {rest} more" if rest > 0 else shown or NOTHING)


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MOST_LETTERS else f"{line[: _MOST_LETTERS - 1]}…"
