"""Scores against scikit-learn and torch; intervals against their definition."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from unisono.report.intervals import (
    RESAMPLES,
    Interval,
    bootstrap_means,
    percentile_interval,
    wilson,
)
from unisono.report.scores import score_classification, score_regression
from unisono.report.texts import cell, difference, ends, number, percent, score, value

GENERATOR = np.random.default_rng(0)
TARGETS = GENERATOR.integers(3, size=80)
LOG_P = torch.from_numpy(GENERATOR.normal(size=(4, 80, 3))).log_softmax(-1).numpy()
NUMBERS = GENERATOR.normal(size=80)
MEAN = NUMBERS + GENERATOR.normal(size=(4, 80))
LOG_VARIANCE = GENERATOR.normal(size=(4, 80))


def column(table, name):
    """Scores of the ensemble and of each member."""
    (k,) = [k for k, found in enumerate(table.columns) if found.name == name]
    rows = [table.rows["ensemble"], *table.members.values()]
    return [row[k].value for row in rows]


def test_scores_of_a_classification():
    table = score_classification(LOG_P, TARGETS, range(4))
    models = [np.exp(LOG_P).mean(0), *np.exp(LOG_P)]
    for name, expected in {
        "accuracy": [metrics.accuracy_score(TARGETS, p.argmax(-1)) for p in models],
        "NLL (nats)": [metrics.log_loss(TARGETS, p) for p in models],
        "Brier": [np.mean(((p - np.eye(3)[TARGETS]) ** 2).sum(-1)) for p in models],
    }.items():
        assert column(table, name) == pytest.approx(expected, rel=1e-12)
    assert list(table.rows) == ["ensemble", "mean of the members"]
    assert list(table.members) == ["member 0", "member 1", "member 2", "member 3"]


def test_scores_of_a_regression():
    table = score_regression(MEAN, LOG_VARIANCE, NUMBERS, range(4))
    models = [MEAN.mean(0), *MEAN]
    normal = torch.distributions.Normal(
        torch.from_numpy(MEAN), torch.from_numpy(LOG_VARIANCE).mul(0.5).exp()
    )
    log_p = normal.log_prob(torch.from_numpy(NUMBERS))
    together = log_p.logsumexp(0) - math.log(4)
    for name, expected in {
        "RMSE": [metrics.root_mean_squared_error(NUMBERS, own) for own in models],
        "MAE": [metrics.mean_absolute_error(NUMBERS, own) for own in models],
        "R²": [metrics.r2_score(NUMBERS, own) for own in models],
        "NLL (nats)": [-together.mean().item(), *(-log_p.mean(1)).tolist()],
    }.items():
        assert column(table, name) == pytest.approx(expected, rel=1e-12)
    covered = [float(((m - NUMBERS) ** 2 <= 1.959964**2 * np.exp(v)).mean())
               for m, v in zip(MEAN, LOG_VARIANCE, strict=True)]  # fmt: skip
    assert column(table, "in the 95 % interval")[1:] == pytest.approx(covered)


def test_members_without_variances_have_no_likelihood():
    table = score_regression(MEAN, None, NUMBERS, range(4))
    assert [found.name for found in table.columns] == ["RMSE", "MAE", "R²"]


def test_large_numbers_keep_their_digits():
    table = score_regression(MEAN + 1e9, None, NUMBERS + 1e9, range(4))
    expected = [metrics.r2_score(NUMBERS, own) for own in [MEAN.mean(0), *MEAN]]
    assert column(table, "R²") == pytest.approx(expected, rel=1e-6)


def test_the_difference_is_narrower_than_either():
    table = score_classification(LOG_P, TARGETS, range(4))
    k = 1  # NLL
    ensemble, average = (row[k] for row in table.rows.values())
    gain = table.difference[k]
    assert gain.value == pytest.approx(ensemble.value - average.value)
    assert gain.low <= gain.value <= gain.high
    assert gain.high - gain.low < ensemble.high - ensemble.low


def test_every_score_lies_in_its_interval():
    for table in (
        score_classification(LOG_P, TARGETS, range(4)),
        score_regression(MEAN, LOG_VARIANCE, NUMBERS, range(4)),
    ):
        for row in [*table.rows.values(), table.difference, *table.members.values()]:
            for found in row:
                assert math.isnan(found.low) or found.low <= found.value <= found.high


def test_bootstrapped_means_have_the_standard_error():
    values = np.stack([GENERATOR.normal(size=400), np.ones(400)])
    means = bootstrap_means(values)
    assert means.shape == (RESAMPLES, 2)
    assert means[:, 0].std() == pytest.approx(values[0].std() / math.sqrt(400), rel=0.1)
    np.testing.assert_allclose(means[:, 1], 1)
    np.testing.assert_array_equal(means, bootstrap_means(values))
    assert not np.array_equal(means, bootstrap_means(values, seed=1))


def test_blocks_of_resamples_give_what_one_block_gives(monkeypatch):
    values = GENERATOR.normal(size=(2, 50))
    expected = bootstrap_means(values)
    monkeypatch.setattr("unisono.report.intervals._BLOCK", 7 * 50)
    np.testing.assert_allclose(bootstrap_means(values), expected)


@pytest.mark.parametrize(("right", "rows"), [(0, 5), (5, 5), (1, 1), (90, 100), (3, 7)])
def test_wilson_is_that_of_scipy(right, rows):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(right, rows).proportion_ci(method="wilson")
    found = wilson(right / rows, rows)
    assert found[1:] == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_infinite_draws_have_no_interval():
    found = percentile_interval(1.0, np.array([1.0, np.inf]))
    assert found.value == 1.0
    assert math.isnan(found.low)


def test_numbers_as_text():
    table = score_classification(LOG_P, TARGETS, range(4))
    share, plain = table.columns[:2]
    nothing, minus, space = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"
    nan = math.nan
    assert [number(x) for x in (0.25, -1.0, 12345.0, nan)] == [
        "0.2500",
        f"{minus}1.000",
        "1.234e+04",
        nothing,
    ]
    assert [percent(x) for x in (0.5, nan)] == [f"50.00{space}%", nothing]
    found = Interval(-0.05, -0.1, 0.01)
    assert score(found, share) == f"{minus}5.00{space}%"
    assert difference(found, share) == f"{minus}5.00 points"
    assert ends(found, share) == f"{minus}10.00 to 1.00"
    assert difference(Interval(0.5, nan, nan), plain) == "+0.5000"
    assert ends(Interval(0.5, nan, nan), plain) == ""
    assert [value(x) for x in (None, nan, True, 3, 0.1, [], {})] == [
        nothing,
        nothing,
        "yes",
        "3",
        "0.1",
        nothing,
        nothing,
    ]
    assert value(list("abcdefghijklmnop")) == "a, b, c, d, e, f, g, h, i, j, k, l and 4 more"
    assert value("two\n lines") == "two lines"
    assert len(cell("x" * 999)) == 60
