"""The speed-ups as a bar chart."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders import LOOP, UNISONO, VMAP
from benchmarks.table import Row

# Okabe and Ito: told apart with every kind of colour vision, and also by lightness.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#444444"
BARS = ((LOOP, BLUE, "than the loop"), (VMAP, ORANGE, "than torch.vmap"))
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def draw(rows: Sequence[Row], file: Path, caption: str) -> None:
    """Write a PNG: how many times faster unisono is than the loop and than vmap.

    Args:
        rows: What was timed; forward is drawn on the left, training on the right.
        file: Where to.
        caption: What the numbers were measured with.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if not math.isnan(row.speed_up)]
    panels = {what: [row for row in rows if f", {what}," in row.name] for what in WHAT}
    panels = {what: own for what, own in panels.items() if own}
    height = 1.8 + 0.34 * max(map(len, panels.values()), default=0)
    figure = Figure(figsize=(2 + 7 * len(panels), height), dpi=110, layout="constrained")
    grid = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axes, (what, own) in zip(grid, panels.items(), strict=False):
        _panel(axes, [row.name.replace(f" {what},", "") for row in own], own)
        axes.set_title(WHAT[what], fontsize=10)
    if panels:
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    text = f"unisono is so many times faster (logarithmic; below 1 slower). {caption}"
    figure.supxlabel(textwrap.fill(text, 60 + 70 * (len(panels) > 1)), fontsize=9)
    figure.savefig(file)


WHAT = {"forward": "forward, without gradients", "training": "forward and backward"}


def _panel(axes: Any, names: Sequence[str], rows: Sequence[Row]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for k, (other, colour, label) in enumerate(BARS):
        values = [row.ratio(other, UNISONO) for row in rows]
        logs = [0.0 if math.isnan(value) else math.log10(value) for value in values]
        places = [y + 0.4 * k - 0.2 for y in range(len(rows))]
        axes.barh(places, logs, height=0.38, color=colour, label=label)
        for place, value, log in zip(places, values, logs, strict=True):
            axes.annotate(
                "does not run" if math.isnan(value) else f"{value:.2f}",
                (log, place),
                xytext=(3 if log >= 0 else -3, 0),
                textcoords="offset points",
                ha="left" if log >= 0 else "right",
                va="center",
                fontsize=7,
                color=GREY,
            )
    axes.axvline(0, color=GREY, linewidth=1)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.01)
    axes.xaxis.set_major_locator(FixedLocator([math.log10(tick) for tick in TICKS]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{10**x:g} x"))
    axes.spines[["top", "right", "left"]].set_visible(False)
