"""The speed-ups as a bar chart."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contenders import LOOP, UNISONO, VMAP
from benchmarks.table import Row

WHAT = {"forward": "forward, without gradients", "training": "forward and backward"}


def draw(rows: Sequence[Row], file: Path, caption: str) -> None:
    """Write a PNG: how many times faster unisono is than the loop and than vmap.

    Args:
        rows: What was timed; forward is drawn on the left, training on the right.
        file: Where to.
        caption: What the numbers were measured with.
    """
    from matplotlib.figure import Figure

    from unisono.plots import speed_bars

    rows = [row for row in rows if not math.isnan(row.speed_up)]
    panels = {what: [row for row in rows if f", {what}," in row.name] for what in WHAT}
    panels = {what: own for what, own in panels.items() if own}
    height = 1.8 + 0.34 * max(map(len, panels.values()), default=0)
    figure = Figure(figsize=(2 + 7 * len(panels), height), dpi=110, layout="constrained")
    grid = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axes, (what, own) in zip(grid, panels.items(), strict=False):
        cases = {
            row.name.replace(f" {what},", ""): {
                name: times.summary() for name, times in row.times.items()
            }
            for row in own
        }
        speed_bars({"cases": cases}, ours=UNISONO, others=(LOOP, VMAP), title=WHAT[what], ax=axes)
    text = f"Logarithmic; below 1 unisono is slower. {caption}"
    figure.supxlabel(textwrap.fill(text, 60 + 70 * (len(panels) > 1)), fontsize=9)
    figure.savefig(file)
