"""The measured times as a Markdown report: ratios, their mean, and where unisono loses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contenders import (
    CAPTURE,
    HAND,
    JAX,
    LOOP,
    LOOP_COMPILED,
    TENSORDICT,
    UNISONO,
    VMAP,
    VMAP_COMPILED,
)
from benchmarks.measure import Times

COLUMNS = (LOOP, VMAP, UNISONO, CAPTURE, TENSORDICT, LOOP_COMPILED, VMAP_COMPILED, JAX, HAND)


@dataclass
class Row:
    """One scenario, timed.

    Args:
        name: Of the scenario.
        times: Contender -> its times.
    """

    name: str
    times: Mapping[str, Times]

    def ratio(self, over: str, under: str) -> float:
        """Median of one contender over that of another; NaN if one was not timed."""
        return self._median(over) / self._median(under)

    @property
    def speed_up(self) -> float:
        """The faster of the loop and vmap over unisono; above 1 unisono is the fastest."""
        return self.fastest_of_both / self._median(UNISONO)

    @property
    def fastest_of_both(self) -> float:
        """Seconds of the loop or of vmap, of the one that is faster."""
        known = [self._median(name) for name in (LOOP, VMAP)]
        return min((t for t in known if not math.isnan(t)), default=math.nan)

    def _median(self, name: str) -> float:
        return self.times[name].median if name in self.times else math.nan


HEADER = [
    "| case | loop / unisono | vmap / unisono | faster of both / unisono | strategy |",
    "|---|---|---|---|---|",
]


def ratio_row(row: Row) -> str:
    """One line of the table of ratios."""
    ratios = [row.ratio(LOOP, UNISONO), row.ratio(VMAP, UNISONO), row.speed_up]
    note = row.times[UNISONO].note if UNISONO in row.times else ""
    cells = [row.name, *map(_number, ratios), note or "-"]
    return "| " + " | ".join(cells) + " |"


def details(rows: Sequence[Row]) -> str:
    """The times of all contenders in milliseconds, and why some are missing."""
    lines = [f"| ms: median (min, IQR) | {' | '.join(COLUMNS)} | rounds |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    reasons: dict[str, list[str]] = {}
    for row in rows:
        cells = []
        for name in COLUMNS:
            times = row.times.get(name, Times(reason="not asked for"))
            cells.append(_milliseconds(times))
            if not times.seconds:
                reasons.setdefault(f"{name}: {times.reason}", []).append(row.name)
        rounds = len(row.times[LOOP].seconds)
        lines.append(f"| {row.name} | {' | '.join(cells)} | {rounds} |")
    lines.append("\nA dash is a contender that was not timed:\n")
    for reason, names in reasons.items():
        where = "; ".join(names) if len(names) <= 4 else f"{len(names)} cases"
        lines.append(f"- {reason} ({where})")
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """The geometric mean, the worst case, and every case in which unisono loses."""
    known = sorted(
        (row for row in rows if not math.isnan(row.speed_up)), key=lambda row: row.speed_up
    )
    if not known:
        return "Nothing was timed."
    mean = geometric_mean([row.speed_up for row in known])
    worst = known[0]
    both = "the faster of loop and vmap"
    lines = [
        f"Speed-up over {both}, geometric mean of {len(known)} cases: {mean:.2f}.",
        f"auto is at most {1 / worst.speed_up:.2f} x {both} in every case (worst: {worst.name}).",
    ]
    losses = [row for row in known if row.speed_up < 1]
    lines.append(f"\nunisono loses in {len(losses)} of {len(known)} cases, worst first:\n")
    lines += [f"- {1 / row.speed_up:.2f} x: {row.name}" for row in losses]
    captured = [row.ratio(CAPTURE, HAND) for row in rows]
    captured = [ratio for ratio in captured if not math.isnan(ratio)]
    if captured:
        lines.append(f"\ncapture is at most {max(captured):.2f} x the hand-written baddbmm.")
    return "\n".join(lines)


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of the product: 2 and 1/2 cancel.

    Example:
        >>> geometric_mean([2.0, 0.5])
        1.0
    """
    return math.exp(sum(map(math.log, values)) / len(values))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def _milliseconds(times: Times) -> str:
    found = times.summary()
    if "median" not in found:
        return "-"
    median, low, iqr = (1e3 * found[key] for key in ("median", "min", "iqr"))
    return f"{median:.3g} ({low:.3g}, {iqr:.2g})"
