"""The picture is a PNG in which no text covers another."""

import io

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from unisono.commands.disagreement import DividedImage
from unisono.commands.picture import MOST_IMAGES, draw_divided


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is drawn meanwhile."""
    seen = []
    save = Figure.savefig

    def remember(figure, *args, **kwargs):
        seen.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return seen


def divided_images(count, members):
    """Images whose votes spread ever wider, up to all ten classes."""
    cases = []
    for index in range(count):
        votes = [0] * 10
        for member in range(members):
            votes[(index + member % (2 + index % 9)) % 10] += 1
        cases.append(DividedImage(index, index % 10, tuple(votes)))
    return cases


def draw(count, members, side=28):
    images = torch.rand(max(count, 3), 1, side, side)
    return draw_divided(divided_images(count, members), images, members=members, title="a title")


@pytest.mark.parametrize("count", [0, 1, 7, 20, pytest.param(33, marks=pytest.mark.slow)])
def test_one_image_and_one_chart_each(figures, count):
    png = draw(count, members=4)
    pixels = matplotlib.image.imread(io.BytesIO(png), format="png")
    assert pixels.ndim == 3
    assert len(figures[0].axes) == 2 * min(count, MOST_IMAGES)


def test_the_votes_and_the_true_class_are_written(figures):
    images = torch.zeros(5, 1, 8, 8)
    case = DividedImage(index=3, label=4, votes=(0, 0, 0, 0, 4, 0, 0, 0, 0, 6))
    draw_divided([case], images, members=10, title="10 models (mlp) on digits")
    image, chart = figures[0].axes
    assert image.get_title() == "true 4"
    assert image.get_xlabel() == "test image 3"
    assert [bar.get_height() for bar in chart.patches] == list(case.votes)
    assert [text.get_text() for text in chart.texts] == ["4", "6"]
    assert figures[0].get_suptitle() == (
        "10 models (mlp) on digits\n1 of 5 test images get more than one answer"
    )


@pytest.mark.parametrize("members", [4, 40, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_text_covers_another(figures, members):
    draw(count=20, members=members)
    figure = figures[0]
    texts = [
        text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()
    ]
    boxes = np.array([text.get_window_extent().extents for text in texts])  # x0, y0, x1, y1
    assert len(boxes) > 20 * 12
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    covers = np.triu((high > low).all(-1), k=1)
    pairs = [(texts[i].get_text(), texts[j].get_text()) for i, j in np.argwhere(covers)]
    assert pairs == []


def test_the_same_picture_twice():
    torch.manual_seed(0)
    first = draw(count=3, members=4)
    torch.manual_seed(0)
    assert draw(count=3, members=4) == first
