"""What holds for every plot: axes in and out, arrays and tensors, texts that don't overlap."""

import itertools
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from unisono import plots


def probabilities(n, rows=400, classes=5):
    logits = np.random.default_rng(0).normal(size=(n, rows, classes))
    logits += 2 * np.eye(classes)[np.arange(rows) % classes]
    exponential = np.exp(logits)
    return exponential / exponential.sum(-1, keepdims=True)


def learning_curves(n, convert, ax):
    loss = np.exp(-np.arange(30) / 6)[:, None] * np.linspace(0.8, 1.2, n)
    return plots.learning_curves(
        convert(loss), validation_loss=convert(loss + 0.1), combined_loss=convert(loss[:, 0]), ax=ax
    )


def sweep(n, convert, ax):
    rates = np.logspace(-4, -1, n)
    return plots.sweep(convert(rates), convert(rates + 1), what="rate", score="accuracy", ax=ax)


def reliability_diagram(n, convert, ax):
    targets = np.arange(400) % 5
    return plots.reliability_diagram(convert(probabilities(n)), convert(targets), ax=ax)


def regression_band(n, convert, ax):
    x = np.linspace(-3, 3, 50)
    mean = np.sin(x) + np.linspace(-0.2, 0.2, n)[:, None] * x
    data = (convert(x), convert(np.sin(x)))
    noise = convert(np.full_like(mean, 0.05))
    return plots.regression_band(convert(x), convert(mean), noise, data=data, ax=ax)


def predicted_against_true(n, convert, ax):
    truth = np.linspace(-3, 3, 50)
    mean = truth + np.linspace(-0.2, 0.2, n)[:, None]
    noise = convert(np.full_like(mean, 0.05))
    return plots.predicted_against_true(convert(mean), convert(truth), noise, ax=ax)


def disagreement_heat_map(n, convert, ax):
    return plots.disagreement_heat_map(convert(probabilities(n).argmax(-1)), ax=ax)


def correlation_heat_map(n, convert, ax):
    return plots.correlation_heat_map(convert(probabilities(n)[..., 0]), ax=ax)


def uncertainty_histogram(n, convert, ax):
    values = np.random.default_rng(n).exponential(0.2, 500)
    return plots.uncertainty_histogram(convert(values[:300]), convert(2 * values[300:]), ax=ax)


def score_by_size(n, convert, ax):
    outputs = convert(probabilities(n))
    found = plots.subset_scores(outputs, lambda some: float(some.mean()))
    return plots.score_by_size(*found, ax=ax)


def speed_bars(n, convert, ax):
    cases = {}
    for k in range(n):
        times = {"loop": {"median": 1 + k % 7}, "unisono": {"median": 1 + k % 3}}
        times["vmap"] = {"reason": "no rule"} if k % 4 == 3 else {"median": 0.5 + k % 5}
        cases[f"MLP of {k} layers, own minibatches"] = times
    return plots.speed_bars({"cases": cases}, ax=ax)


PLOTS = (
    learning_curves,
    sweep,
    reliability_diagram,
    regression_band,
    predicted_against_true,
    disagreement_heat_map,
    correlation_heat_map,
    uncertainty_histogram,
    score_by_size,
    speed_bars,
)
every_plot = pytest.mark.parametrize("draw", PLOTS, ids=lambda draw: draw.__name__)


def drawn_texts(figure, monkeypatch):
    """Text -> its box in pixels, of all texts that drawing the figure really draws."""
    found = {}
    original = Text.draw

    def draw(self, renderer):
        if self.get_visible() and self.get_text().strip():
            found[self] = self.get_window_extent(renderer)
        original(self, renderer)

    monkeypatch.setattr(Text, "draw", draw)
    figure.canvas.draw()
    return found


def overlapping(boxes):
    """Pairs of texts whose boxes share more than the rim of a pixel."""
    return [
        (a.get_text(), b.get_text())
        for (a, one), (b, other) in itertools.combinations(boxes.items(), 2)
        if one.x0 + 1 < other.x1
        and other.x0 + 1 < one.x1
        and one.y0 + 1 < other.y1
        and other.y0 + 1 < one.y1
    ]


@every_plot
@pytest.mark.parametrize("n", [1, 4, 40, 200])
def test_texts_neither_overlap_nor_leave_the_picture(draw, n, monkeypatch):
    if draw is speed_bars and n == 200:
        pytest.skip("200 members are still one case")
    ax = draw(n, np.asarray, None)
    boxes = drawn_texts(ax.figure, monkeypatch)
    assert len(boxes) >= 4
    assert overlapping(boxes) == []
    width, height = ax.figure.canvas.get_width_height()
    outside = [
        text.get_text()
        for text, box in boxes.items()
        if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]
    assert outside == []


def test_overlapping_texts_are_found(monkeypatch):
    ax = sweep(4, np.asarray, None)
    ax.text(0.5, 0.5, "one", transform=ax.transAxes)
    ax.text(0.51, 0.51, "other", transform=ax.transAxes)
    assert overlapping(drawn_texts(ax.figure, monkeypatch)) == [("one", "other")]


@every_plot
def test_the_given_axes_are_drawn_on_and_returned(draw):
    figure = Figure()
    first, second = figure.subplots(1, 2)
    assert draw(4, np.asarray, second) is second
    assert second.has_data()
    assert not first.has_data()


@every_plot
def test_tensors_give_the_same_picture_as_arrays(draw):
    def to_tensor(values):
        tensor = torch.from_numpy(np.array(values))
        return tensor.requires_grad_() if tensor.is_floating_point() else tensor

    expected = plots.to_png(draw(4, np.asarray, None))
    assert plots.to_png(draw(4, to_tensor, None)) == expected


@every_plot
def test_pyplot_is_not_touched(draw):
    before = "matplotlib.pyplot" in sys.modules
    draw(4, np.asarray, None)
    assert ("matplotlib.pyplot" in sys.modules) == before


@every_plot
def test_without_matplotlib_the_extra_is_named(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    message = (
        r"^a plot needs the package matplotlib, from the extra `plots`: "
        r'pip install "unisono\[plots\]"$'
    )
    with pytest.raises(ImportError, match=message):
        draw(4, np.asarray, None)


@every_plot
def test_ax_that_is_no_axes_is_refused(draw):
    with pytest.raises(TypeError, match=r"^ax must be Matplotlib's Axes, got Figure; write `figur"):
        draw(4, np.asarray, Figure())


def test_a_subfigure_is_written_with_its_whole_figure():
    left, right = Figure().subfigures(1, 2)
    ax = sweep(4, np.asarray, right.subplots())
    assert plots.to_png(ax) == plots.to_png(left.figure)


def test_titles_and_names_are_no_mathematics(monkeypatch):
    ax = plots.sweep([1.0, 2.0], [0.1, 0.2], what="$x_$", score="$\\frac", title="cost in $, a_$b")
    texts = {text.get_text() for text in drawn_texts(ax.figure, monkeypatch)}
    assert {"$x_$", "$\\frac", "cost in $, a_$b"} <= texts


def test_half_precision_is_drawn():
    loss = torch.tensor([[1.0, 0.5], [0.5, 0.25]], dtype=torch.bfloat16)
    assert plots.learning_curves(loss).lines[0].get_ydata().tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: plots.learning_curves([1.0, 2.0]),
            (
                "learning_curves: the shapes don't fit together, or one is empty; expected\n"
                "  loss: (epochs, N), got (2,)"
            ),
        ),
        (
            lambda: plots.learning_curves(np.ones((3, 2)), validation_loss=np.ones((3, 4))),
            (
                "learning_curves: the shapes don't fit together, or one is empty; expected\n"
                "  loss: (epochs, N), got (3, 2)\n"
                "  validation_loss: (epochs, N), got (3, 4)"
            ),
        ),
        (
            lambda: plots.disagreement_heat_map(np.ones((0, 4), dtype=int)),
            (
                "disagreement_heat_map: the shapes don't fit together, or one is empty; "
                "expected\n  labels: (N, B), got (0, 4)"
            ),
        ),
        (
            lambda: plots.disagreement_heat_map(np.ones((2, 4))),
            (
                "disagreement_heat_map: labels must be classes, got float64; of logits "
                "(N, B, C) write `logits.argmax(-1)`"
            ),
        ),
        (
            lambda: plots.correlation_heat_map([["a", "b"]]),
            "correlation_heat_map: outputs must hold real numbers, got dtype <U1",
        ),
        (
            lambda: plots.correlation_heat_map(torch.tensor([[1.0, float("nan")]])),
            (
                "correlation_heat_map: outputs must be finite, but 1 of 2 values are not; the "
                "first is nan at (0, 1)"
            ),
        ),
        (
            lambda: plots.reliability_diagram(np.full((1, 2, 2), 0.5), [0, 2]),
            (
                "reliability_diagram: targets must be whole numbers from 0 to 1, one of the 2 "
                "classes, got int64 from 0 to 2"
            ),
        ),
        (
            lambda: plots.reliability_diagram(np.full((1, 2, 2), 3.0), [0, 1]),
            (
                "reliability_diagram: rows of probabilities must be 0 or more and sum to 1; row "
                "(0, 0) sums to 6 with the lowest value 3; of logits write `logits.softmax(-1)`"
            ),
        ),
        (
            lambda: plots.reliability_diagram(np.full((1, 2, 2), 0.5), [0, 1], bins=0),
            "reliability_diagram: bins must be at least 1, got 0",
        ),
        (
            lambda: plots.regression_band([0.0, 1.0], [[0.0, 1.0]], [[0.1, -0.5]]),
            (
                "regression_band: variance must be 0 or more, got -0.5 at (0, 1); of "
                "log-variances write `log_variance.exp()`"
            ),
        ),
        (
            lambda: plots.uncertainty_histogram([0.1], []),
            (
                "uncertainty_histogram: the shapes don't fit together, or one is empty; "
                "expected\n  inside: (n,), got (1,)\n  outside: (m,), got (0,)"
            ),
        ),
        (
            lambda: plots.uncertainty_histogram([0.1], [0.2], bins=0),
            "uncertainty_histogram: bins must be at least 1, got 0",
        ),
        (
            lambda: plots.subset_scores(np.ones((3, 2)), np.mean, sizes=[1, 4]),
            (
                "subset_scores: sizes must be from 1 to 3, the number of members, and subsets at "
                "least 1; got sizes [1, 4] and subsets 20"
            ),
        ),
        (
            lambda: plots.subset_scores(np.ones(()), np.mean),
            "subset_scores: outputs must be (N, B, ...), got shape ()",
        ),
        (
            lambda: plots.score_by_size([1, 2], [[0.5]]),
            "score_by_size: 2 sizes need 2 lists of scores, got 1",
        ),
        (
            lambda: plots.speed_bars({"cases": {}}),
            (
                'speed_bars: results must be {"cases": {case: {contender: {"median": seconds}}}} '
                "with at least one case; write `json.loads(file.read_text())` of what `python -m "
                "benchmarks.predict --json FILE` wrote"
            ),
        ),
        (
            lambda: plots.speed_bars({"cases": {"A": {"jax": {"median": 1.0}}}}),
            "speed_bars: unisono was timed in none of the 1 cases; there are jax",
        ),
        (
            lambda: plots.speed_bars({"cases": {"A": {}}}, others=()),
            "speed_bars: others must name one to 3 contenders, got []",
        ),
    ],
)
def test_what_cannot_be_drawn_is_told(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value) == f"plots.{message}"
