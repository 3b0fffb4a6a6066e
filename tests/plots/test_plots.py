"""What each plot shows: lines, areas, numbers, legends."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from unisono import plots
from unisono.plots.reliability import bin_answers


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def some_probabilities(n=4, rows=300, classes=3):
    return np.random.default_rng(0).dirichlet(np.ones(classes), size=(n, rows))


# Reliability --------------------------------------------------------------------------------------


def test_reliability_has_faint_members_and_a_bold_ensemble():
    probabilities = some_probabilities()
    ax = plots.reliability_diagram(probabilities, np.zeros(300, dtype=int))
    ideal, *members, hidden, ensemble = ax.lines
    assert ideal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert len(members) == 4
    assert all(line.get_alpha() < 0.5 for line in members)
    assert ensemble.get_linewidth() > 2 * members[0].get_linewidth()
    assert len(hidden.get_xdata()) == 0
    assert legend(ax)[0] == "ideal"
    (strip,) = ax.child_axes
    assert sum(bar.get_height() for bar in strip.patches) == 300


def test_reliability_of_a_case_by_hand():
    # Two rows with 0.9 (one right), two with 0.6 (both right): gaps 0.4 and 0.4.
    probabilities = np.array([[[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]]])
    ax = plots.reliability_diagram(probabilities, [0, 1, 0, 1])
    line = ax.lines[-1]
    shown = line.get_xydata()[~np.isnan(line.get_ydata())]
    np.testing.assert_allclose(shown, [[0.6, 1.0], [0.9, 0.5]])
    assert legend(ax) == ["ideal", "model, ECE 0.400"]


def test_bins_hold_their_upper_edge():
    confidence = np.array([0.51, 0.6, 0.61, 1.0])
    found = bin_answers(np.stack([confidence, 1 - confidence], -1), np.zeros(4, dtype=int), 10)
    assert np.repeat(np.arange(10), found.counts).tolist() == [5, 5, 6, 9]


def test_calibration_error_is_that_of_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    probabilities = some_probabilities(1)[0]
    targets = np.random.default_rng(1).integers(3, size=300)
    expected = functional.multiclass_calibration_error(
        torch.from_numpy(probabilities), torch.from_numpy(targets), num_classes=3, n_bins=15
    )
    assert bin_answers(probabilities, targets, 15).error == pytest.approx(expected.item(), rel=1e-5)


def test_combined_probabilities_take_the_place_of_the_mean():
    probabilities = some_probabilities()
    targets = np.zeros(300, dtype=int)
    one = plots.reliability_diagram(probabilities, targets, combined=probabilities[2]).lines[-1]
    other = plots.reliability_diagram(probabilities[2:3], targets).lines[-1]
    np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())


# Regression ---------------------------------------------------------------------------------------


def test_band_has_two_deviations_of_each_kind():
    mean = np.array([[1.0, 0.0], [3.0, 0.0]])
    ax = plots.regression_band([0.0, 1.0], mean, np.full((2, 2), 3.0))
    total, epistemic = ax.collections
    assert total.get_paths()[0].get_extents().y1 == pytest.approx(2 + 2 * math.sqrt(1 + 3))
    assert epistemic.get_paths()[0].get_extents().y1 == pytest.approx(2 + 2 * math.sqrt(1))
    assert legend(ax) == [
        "total, ±2 standard deviations",
        "epistemic, ±2 standard deviations",
        "2 members",
        "their mean",
    ]


def test_band_sorts_its_input():
    ax = plots.regression_band([2.0, 0.0, 1.0], [[20.0, 0.0, 10.0]], data=([5.0], [7.0]))
    assert ax.lines[-1].get_xydata().tolist() == [[0, 0], [1, 10], [2, 20]]
    assert ax.collections[-1].get_offsets().tolist() == [[5, 7]]


def test_predictions_of_one_point_model_have_no_bars():
    ax = plots.predicted_against_true([[1.0, 2.0]], [1.5, 2.5])
    assert legend(ax) == ["equal", "2 rows"]
    assert ax.collections[0].get_offsets().tolist() == [[1.5, 1.0], [2.5, 2.0]]


def test_many_predictions_have_no_bars():
    ax = plots.predicted_against_true(np.random.rand(3, 201), np.random.rand(201))
    assert legend(ax) == ["equal", "201 rows"]


# Heat maps ----------------------------------------------------------------------------------------


def test_disagreement_of_three_members():
    ax = plots.disagreement_heat_map([[0, 1, 2, 2], [0, 1, 2, 1], [1, 0, 0, 0]])
    shown = ax.images[0].get_array()
    assert shown.filled(-1).tolist() == [[-1, 0.25, 1], [0.25, -1, 1], [1, 1, -1]]
    assert sorted(text.get_text() for text in ax.texts) == [".25", ".25", *["1.00"] * 4]


def test_many_members_have_colours_and_no_numbers():
    assert len(plots.disagreement_heat_map(np.eye(11, dtype=int)).texts) == 0


def test_correlation_is_that_of_numpy():
    outputs = np.random.default_rng(0).normal(size=(4, 50)) + 1e3
    shown = plots.correlation_heat_map(outputs).images[0].get_array()
    expected = np.corrcoef(outputs)
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(shown.filled(0), expected, atol=1e-9)


def test_a_constant_member_correlates_with_nothing():
    shown = plots.correlation_heat_map([[0.1, 0.1, 0.1], [1.0, 2.0, 3.0]]).images[0].get_array()
    assert shown.mask.all()


# Histogram, sizes ---------------------------------------------------------------------------------


def test_histogram_tells_the_area_under_the_curve():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    inside, outside = generator.integers(5, size=40) / 4, generator.integers(2, 7, size=30) / 4
    ax = plots.uncertainty_histogram(inside, outside, names=("right", "wrong"), what="doubt")
    expected = metrics.roc_auc_score([0] * 40 + [1] * 30, np.concatenate([inside, outside]))
    assert ax.get_legend().get_title().get_text() == f"AUROC {expected:.3f}"
    assert legend(ax) == ["right, 40 rows", "wrong, 30 rows"]
    assert ax.get_xlabel() == "doubt"
    for area in ax.patches:
        assert np.sum(area.get_data().values) == pytest.approx(1)
    assert ax.patches[1].get_hatch() == "////"  # told apart without colours


def test_equal_uncertainties_are_one_bar():
    ax = plots.uncertainty_histogram(np.zeros(5), np.zeros(3))
    assert ax.get_legend().get_title().get_text() == "AUROC 0.500"


def test_all_subsets_are_taken_if_they_are_few():
    outputs = torch.tensor([[1.0], [2.0], [4.0]])
    found = plots.subset_scores(outputs, lambda some: some.sum())
    assert found.sizes == (1, 2, 3)
    assert [sorted(own) for own in found.scores] == [[1, 2, 4], [3, 5, 6], [7]]


def test_subsets_are_drawn_without_replacement_and_repeat():
    outputs = 2.0 ** np.arange(40)[:, None]
    one, other = (plots.subset_scores(outputs, np.sum, sizes=[20], subsets=5) for _ in range(2))
    assert one == other
    assert [bin(int(score)).count("1") for score in one.scores[0]] == [20] * 5
    assert plots.subset_scores(outputs, np.sum, sizes=[20], subsets=5, seed=1) != one


@pytest.mark.parametrize("n", [1, 2, 12, 13, 40, 200, 1000])
def test_sizes_go_from_one_to_all(n):
    sizes = plots.subset_scores(np.ones((n, 1)), np.mean, subsets=1).sizes
    assert sizes[0] == 1
    assert sizes[-1] == n
    assert len(sizes) == min(n, 12) or (len(sizes) < 12 and n > 12)
    assert list(sizes) == sorted(set(sizes))


def test_score_by_size_has_the_mean_and_the_middle():
    ax = plots.score_by_size([1, 2], [list(range(101)), [50.0]], what="score")
    assert ax.lines[0].get_xydata().tolist() == [[1, 50], [2, 50]]
    box = ax.collections[0].get_paths()[0].get_extents()
    assert (box.y0, box.y1) == pytest.approx((5, 95))
    assert ax.get_ylabel() == "score"


# Training -----------------------------------------------------------------------------------------


def test_learning_curves_differ_in_colour_and_style():
    ax = plots.learning_curves(
        np.ones((5, 3)), validation_loss=np.ones((5, 3)), combined_loss=np.ones(5)
    )
    bold = [line for line in ax.lines if line.get_linewidth() == 2]
    assert len(ax.lines) == 2 * 3 + 3
    assert len({line.get_linestyle() for line in bold}) == 3
    assert len({to_rgb(line.get_color()) for line in bold}) == 3


# Speed --------------------------------------------------------------------------------------------


def test_speed_bars_are_ratios_on_a_log_axis(tmp_path):
    file = tmp_path / "bench.json"
    times = {"loop": {"median": 4.0}, "vmap": {"median": 0.5}, "unisono": {"median": 1.0}}
    cases = {
        "MLP": times,
        "LSTM": {**times, "vmap": {"reason": "no rule"}},
        "none": {"loop": {"median": 1.0}, "unisono": {"reason": "broken"}},
    }
    file.write_text(json.dumps({"run": "a machine", "cases": cases}))
    ax = plots.speed_bars(json.loads(file.read_text()))
    assert ax.get_xscale() == "log"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["MLP", "LSTM"]
    ends = [bar.get_x() + bar.get_width() for bar in ax.patches]
    assert ends == pytest.approx([4, 4, 0.5, 1])
    assert [text.get_text() for text in ax.texts] == ["4.00", "4.00", "0.50", "did not run"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["than loop", "than vmap"]
