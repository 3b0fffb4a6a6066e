"""A picture of the test images on which the members disagree most, with their votes.

It uses matplotlib's objects and not pyplot, so it opens no window and changes no global state.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator
from torch import Tensor

from unisono.commands.disagreement import DividedImage

# Two colours of the Okabe-Ito palette: apart for every kind of colour blindness and in grey.
# A hatch marks the true class a second time, for a print in black and white.
_TRUE: Final = "#E69F00"
_OTHER: Final = "#0072B2"
_HATCH: Final = "////"

_COLUMNS: Final = 5
_ROWS: Final = 4
MOST_IMAGES: Final = _COLUMNS * _ROWS


def draw_divided(
    divided: Sequence[DividedImage], images: Tensor, *, members: int, title: str
) -> bytes:
    """Draw the first images of `divided`, each above a chart of its votes.

    Args:
        divided: The images to show, the most divided first; more than `MOST_IMAGES` are
            left out.
        images: All test images.
        members: Number of members, the height of a unanimous vote.
        title: A line above the picture.

    Returns:
        The picture as a PNG file.

    Shape:
        - images: ``(B, channels, height, width)``
    """
    shown = divided[:MOST_IMAGES]
    rows = max(1, -(-len(shown) // _COLUMNS))
    figure = Figure(figsize=(10, 1.0 + 2.6 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n{_summary(divided, len(shown), len(images))}", fontsize=12)
    if shown:
        # A picture and its votes belong together: close to each other, away from the rest.
        cells = figure.subfigures(rows, _COLUMNS, squeeze=False).flat
        for cell, case in zip(cells, shown, strict=False):
            above, below = cell.subplots(2, 1, height_ratios=[3, 1.6])
            _draw_image(above, images[case.index], case)
            _draw_votes(below, case, members)
        legend = [
            Patch(facecolor=_TRUE, hatch=_HATCH, label="votes for the true class"),
            Patch(facecolor=_OTHER, label="votes for another class"),
        ]
        figure.legend(handles=legend, loc="outside lower center", ncols=2, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _summary(divided: Sequence[DividedImage], shown: int, total: int) -> str:
    if not divided:
        return f"every member gives the same answer on each of the {total:,} test images"
    several = f"{len(divided):,} of {total:,} test images get more than one answer"
    return f"{several}; the {shown} most divided" if shown < len(divided) else several


def _draw_image(axes: Axes, image: Tensor, case: DividedImage) -> None:
    axes.imshow(image.mean(0).numpy(force=True), cmap="gray_r", vmin=0, vmax=1)
    axes.set_title(f"true {case.label}", fontsize=11)
    axes.set_xlabel(f"test image {case.index}", fontsize=7, color="0.35", labelpad=2)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_votes(axes: Axes, case: DividedImage, members: int) -> None:
    small = 7 if members < 100 else 5.5  # numbers of three digits still fit side by side
    for label, votes in enumerate(case.votes):
        true = label == case.label
        axes.bar(label, votes, facecolor=_TRUE if true else _OTHER, hatch=_HATCH if true else None)
        if votes:
            axes.text(label, votes + 0.03 * members, str(votes), ha="center", fontsize=small)
    axes.set_xlim(-0.6, len(case.votes) - 0.4)
    axes.set_ylim(0, 1.3 * max(case.votes))  # room for the numbers above the bars
    axes.xaxis.set_major_locator(FixedLocator(range(len(case.votes))))
    axes.tick_params(axis="x", labelsize=8, length=0, pad=2)
    axes.set_yticks([])
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.get_xticklabels()[case.label].set_fontweight("bold")
