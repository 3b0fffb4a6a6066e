"""Bars of the benchmarks: how many times faster one way to run is than others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from unisono.plots.figure import BLUE, GREY, ORANGE, axes_for

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TICKS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_STYLES: Final[tuple[dict[str, Any], ...]] = (
    {"fc": BLUE},
    {"fc": ORANGE, "hatch": "////"},
    {"fc": "#BBBBBB", "hatch": "..."},
)


def speed_bars(
    results: Mapping[str, Any],
    *,
    ours: str = "unisono",
    others: Sequence[str] = ("loop", "vmap"),
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw how many times faster `ours` is than each of `others`, case by case, on a log scale.

    A bar is a quotient of medians, ``seconds(other) / seconds(ours)``; below 1 `ours` is slower.

    Args:
        results: What ``python -m benchmarks.predict --json FILE`` writes, loaded:
            ``{"cases": {case: {contender: {"median": seconds}}}}``. A contender without a median
            did not run.
        ours: The contender that is compared.
        others: At most three to compare it with.
        title: A line above.
        ax: Where to draw; None for a new figure, ``.figure`` of what is returned.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no case, or none in which `ours` ran.
        MissingExtraError: If Matplotlib isn't installed.

    Example:
        >>> times = {
        ...     "loop": {"median": 3e-3},
        ...     "vmap": {"median": 2e-3},
        ...     "unisono": {"median": 1e-3},
        ... }
        >>> ax = speed_bars({"cases": {"MLP": times}})
        >>> [text.get_text() for text in ax.texts]
        ['3.00', '2.00']
    """
    cases = _cases(results, ours, others)
    ax = axes_for(ax, title, size=(7.5, 1.6 + 0.17 * len(others) * len(cases)))
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    height = 0.8 / len(others)
    for k, other in enumerate(others):
        for row, times in enumerate(cases.values()):
            ratio = times[other] / times[ours]
            end = 1.0 if math.isnan(ratio) else ratio
            place = row + height * (k - (len(others) - 1) / 2)
            label = f"than {other}" if row == 0 else None
            style: dict[str, Any] = {"height": 0.95 * height, "ec": "white", "lw": 0} | _STYLES[k]
            ax.barh(place, end - 1, left=1, label=label, **style)
            text = "did not run" if math.isnan(ratio) else f"{ratio:.2f}"
            ax.annotate(
                text,
                (end, place),
                xytext=(3 if end >= 1 else -3, 0),
                textcoords="offset points",
                ha="left" if end >= 1 else "right",
                va="center",
                fontsize=7,
                color=GREY,
            )
    ax.axvline(1, color=GREY, lw=1)
    ax.set_xscale("log")
    ax.set_yticks(range(len(cases)), list(cases), fontsize=8, parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.margins(x=0.15, y=0.01)
    ax.xaxis.set_major_locator(FixedLocator(_TICKS))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} x"))
    ax.set_xlabel(f"{ours} is so many times faster", parse_math=False)
    ax.grid(visible=False, axis="y")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0)
    return ax


def _cases(
    results: Mapping[str, Any], ours: str, others: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Case -> contender -> median seconds, NaN where it did not run."""
    if not 1 <= len(others) <= len(_STYLES):
        raise ValueError(
            f"plots.speed_bars: others must name one to {len(_STYLES)} contenders, "
            f"got {list(others)}"
        )
    cases = results.get("cases") if isinstance(results, Mapping) else None
    if not isinstance(cases, Mapping) or not cases:
        raise ValueError(
            'plots.speed_bars: results must be {"cases": {case: {contender: {"median": seconds}}}} '
            "with at least one case; write `json.loads(file.read_text())` of what `python -m "
            "benchmarks.predict --json FILE` wrote"
        )
    found = {
        name: {one: float(times.get(one, {}).get("median", math.nan)) for one in (ours, *others)}
        for name, times in cases.items()
    }
    ran = {name: times for name, times in found.items() if not math.isnan(times[ours])}
    if not ran:
        contenders = sorted({contender for times in cases.values() for contender in times})
        raise ValueError(
            f"plots.speed_bars: {ours} was timed in none of the {len(cases)} cases; "
            f"there are {', '.join(contenders)}"
        )
    return ran
