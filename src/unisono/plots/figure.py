"""Where plots are drawn: axes of their own or the user's, colours, legends, PNG files."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Final, Literal

from unisono.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Of the palette of Okabe and Ito (2008): apart for every kind of colour blindness. Plots tell
# lines and areas apart by their style or hatch too, for a print in grey.
BLUE: Final = "#0072B2"
VERMILLION: Final = "#D55E00"
ORANGE: Final = "#E69F00"
BLACK: Final = "#000000"
GREY: Final = "#595959"

Layout = Literal["constrained", "compressed"]

MOST_LINES: Final = 50
"""More members than that are a band or a faint cloud instead of lines."""


def axes_for(
    ax: Axes | None,
    title: str,
    *,
    size: tuple[float, float] = (7, 4.2),
    layout: Layout = "constrained",
) -> Axes:
    """Return the axes to draw on: the given ones, or those of a new figure.

    Args:
        ax: What the user gave; None for a figure that pyplot knows nothing of.
        title: A line above; drawn as it is, without mathematics in it.
        size: Of the new figure, in inches.
        layout: How the new figure finds room for labels.

    Raises:
        TypeError: If `ax` is something else, such as a figure.
        MissingExtraError: If Matplotlib isn't installed.
    """
    require("matplotlib", extra="plots", purpose="a plot")
    if ax is not None:
        if not hasattr(ax, "transAxes"):
            raise TypeError(
                f"ax must be Matplotlib's Axes, got {type(ax).__name__}; "
                "write `figure, ax = plt.subplots()`"
            )
        if title:
            ax.set_title(title, parse_math=False)
        return ax
    own = new_axes(size=size, layout=layout)
    if title:  # about ten letters to the inch
        own.set_title(textwrap.fill(title, int(10 * size[0]) - 8), parse_math=False)
    return own


def new_axes(
    *, size: tuple[float, float], layout: Layout = "constrained", dpi: float = 110
) -> Axes:
    """Make a figure that pyplot knows nothing of, and return its axes.

    Args:
        size: In inches.
        layout: How it finds room for labels.
        dpi: Pixels in an inch of a PNG file.
    """
    require("matplotlib", extra="plots", purpose="a plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)
    own: Axes = figure.subplots()
    own.grid(alpha=0.25)
    own.set_axisbelow(True)
    own.spines[["top", "right"]].set_visible(False)
    return own


def legend(
    ax: Axes,
    *,
    loc: Literal["best", "upper left"] = "best",
    bottom: float = 0.0,
    columns: int = 1,
    title: str = "",
) -> None:
    """Add a legend that stays readable where it covers lines.

    Args:
        ax: Where to.
        loc: Where in the axes.
        bottom: How much of the axes' height is not for it.
        columns: Of the entries.
        title: Above them.
    """
    # A named place: the default one warns if it takes long.
    place = (0, bottom, 1, 1 - bottom)
    made = ax.legend(loc=loc, bbox_to_anchor=place, ncols=columns, framealpha=0.8, edgecolor="none")
    if title:
        made.set_title(title)
        made.set_alignment("left")
    for text in made.get_texts():
        text.set_parse_math(False)


def faintness(members: int) -> float:
    """The opacity at which so many lines neither vanish nor hide what lies below them."""
    return max(0.04, min(0.4, 8 / members))


def to_png(plot: Axes | Figure) -> bytes:
    """Write a plot as a PNG file; the same bytes for the same plot.

    Args:
        plot: A Matplotlib figure, or axes, whose whole figure is written.

    Returns:
        The content of the file.

    Example:
        >>> from unisono.plots import learning_curves
        >>> to_png(learning_curves([[1.0, 1.5], [0.5, 1.0]]))[1:4]
        b'PNG'
    """
    owner: Figure | SubFigure | None = plot.figure
    while owner is not None and not hasattr(owner, "savefig"):
        owner = owner.figure  # of a subfigure
    content = io.BytesIO()
    owner.savefig(content, format="png")  # type: ignore[union-attr]
    return content.getvalue()
