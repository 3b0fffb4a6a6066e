"""Temperatures against an independent minimiser, closed forms, and what has no minimum."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from unisono import calibration, combine

examples = settings(max_examples=40, deadline=None)


def members(n, rows, classes, seed=0):
    """Logits of members with temperatures of their own, and classes drawn from what they say."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 2
    y = torch.multinomial(truth.softmax(-1), 1, generator=generator).squeeze(1)
    noise = torch.randn(n, rows, classes, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-0.5, 0.7, n, dtype=torch.float64).reshape(n, 1, 1)
    return (truth + noise / 2) * scale, y


def best_temperature(logits, y):
    """By scipy, of one prediction (rows, classes), in float64."""
    optimize = pytest.importorskip("scipy.optimize")

    def loss(log_t):
        return F.cross_entropy(logits.double() / math.exp(log_t), y).item()

    bounds = math.log(calibration.LOWEST), math.log(calibration.HIGHEST)
    found = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9})
    return torch.tensor(math.exp(found.x), dtype=torch.float64)


def pooled_by_hand(logits, weights=None, temperatures=None):
    """The logarithm of the average in float64, member by member."""
    n = len(logits)
    weights = np.ones(n) if weights is None else np.asarray(weights)
    total = 0
    for i in range(n):
        t = 1.0 if temperatures is None else float(temperatures[i])
        total = total + float(weights[i]) / weights.sum() * (logits[i].double() / t).softmax(-1)
    return total.log()


@pytest.mark.parametrize(("n", "rows", "classes"), [(1, 50, 2), (5, 200, 3), (3, 300, 10)])
def test_member_temperatures_equal_scipy(n, rows, classes):
    logits, y = members(n, rows, classes)
    expected = torch.stack([best_temperature(own, y) for own in logits])
    # A minimum is flat: scipy finds its place to the root of what it finds of its value.
    torch.testing.assert_close(
        calibration.member_temperatures(logits, y), expected, rtol=1e-5, atol=0
    )


def test_the_slope_is_zero_at_the_temperature():
    logits, y = members(4, 300, 5)
    t = calibration.member_temperatures(logits, y).requires_grad_()
    loss = sum(F.cross_entropy(own / own_t, y) for own, own_t in zip(logits, t, strict=True))
    (slope,) = torch.autograd.grad(loss, t)
    torch.testing.assert_close(slope, torch.zeros(4).double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0], torch.tensor([0.2, 0.5, 0.3])])
@pytest.mark.parametrize("own", [False, True])
def test_pooled_temperature_equals_scipy(weights, own):
    logits, y = members(3, 200, 4)
    temperatures = calibration.member_temperatures(logits, y) if own else None
    expected = best_temperature(pooled_by_hand(logits, weights, temperatures), y)
    found = calibration.pooled_temperature(logits, y, weights=weights, temperatures=temperatures)
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    pooled = calibration.pool(logits, weights=weights, temperatures=temperatures)
    torch.testing.assert_close(pooled, pooled_by_hand(logits, weights, temperatures))


def test_averages_of_calibrated_members_are_too_unsure():
    logits, y = members(5, 3000, 4)
    temperatures = calibration.member_temperatures(logits, y)
    assert calibration.pooled_temperature(logits, y, temperatures=temperatures) < 0.95


@given(st.floats(0.05, 20), st.integers(0, 10**6))
@examples
def test_scaled_logits_have_a_scaled_temperature(factor, seed):
    logits, y = members(3, 60, 3, seed)
    t = calibration.member_temperatures(logits, y)
    inside = (t * factor > calibration.LOWEST) & (t * factor < calibration.HIGHEST)
    inside &= (t > calibration.LOWEST) & (t < calibration.HIGHEST)
    scaled = calibration.member_temperatures(factor * logits, y)
    torch.testing.assert_close(scaled[inside], (factor * t)[inside], rtol=1e-5, atol=0)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(2, 4), st.integers(0, 10**6))
@examples
def test_no_temperature_is_better(n, rows, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, rows, classes, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (rows,), generator=generator)
    t = calibration.member_temperatures(logits, y)
    assert ((t >= 0.99 * calibration.LOWEST) & (t <= 1.01 * calibration.HIGHEST)).all()
    losses = torch.stack([F.cross_entropy(z, y) for z in calibration.apply(logits, t)])
    for other in (calibration.LOWEST, 0.3, 1.0, 3.0, calibration.HIGHEST):
        assert (losses <= torch.stack([F.cross_entropy(z / other, y) for z in logits]) + 1e-9).all()
    # A member's temperature doesn't depend on the others.
    torch.testing.assert_close(
        calibration.member_temperatures(logits[-1:], y), t[-1:], rtol=1e-5, atol=0
    )


def test_members_without_a_minimum_are_bounded():
    y = torch.arange(30) % 3
    right = F.one_hot(y, 3).double()
    logits = torch.stack([right, -right, 0 * right, 1e-3 * right, 300 * right])
    t = calibration.member_temperatures(logits, y)
    expected = [calibration.LOWEST, calibration.HIGHEST, 1, calibration.LOWEST, calibration.LOWEST]
    torch.testing.assert_close(t, torch.tensor(expected).double())
    assert calibration.apply(logits, t).isfinite().all()


def test_huge_logits():
    logits, y = members(2, 100, 3)
    t = calibration.member_temperatures(logits, y)
    torch.testing.assert_close(
        calibration.member_temperatures(logits * 10, y), 10 * t, rtol=1e-5, atol=0
    )
    assert calibration.member_temperatures(logits * 1e30, y).tolist() == pytest.approx([100, 100])


def test_one_class_in_the_targets_and_one_class_at_all():
    logits, _ = members(3, 40, 3)
    y = torch.zeros(40, dtype=torch.int64)
    expected = torch.stack([best_temperature(own, y) for own in logits])
    torch.testing.assert_close(
        calibration.member_temperatures(logits, y), expected, rtol=1e-4, atol=0
    )
    assert calibration.member_temperatures(logits[..., :1], y).tolist() == [1, 1, 1]


def test_classes_that_are_impossible():
    logits, y = members(3, 60, 3)
    never = torch.full((3, 60, 1), -math.inf, dtype=torch.float64)
    torch.testing.assert_close(
        calibration.member_temperatures(torch.cat([logits, never], -1), y),
        calibration.member_temperatures(logits, y),
    )


def test_probabilities_of_exactly_one():
    y = torch.tensor([0, 1, 0])
    p = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]])
    assert calibration.member_temperatures(p[:1].log(), y).tolist() == [1]  # equal everywhere
    with pytest.raises(
        ValueError,
        match=r"^calibration\.member_temperatures: a logit of -inf, or a probability of zero,"
        r" stands at the true class of some rows, .*\(member 1: 1 of 3 rows\); pass logits, or",
    ):
        calibration.member_temperatures(p.log(), y)
    # What the message says helps.
    assert calibration.member_temperatures(p.clamp_min(1e-12).log(), y).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    logits, y = members(4, 200, 5)
    logits = logits.to(dtype)
    for function in (calibration.member_temperatures, calibration.pooled_temperature):
        found = function(logits, y)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, function(logits.double(), y).float(), rtol=1e-5, atol=0)
    assert calibration.apply(logits, found).dtype == dtype
    assert calibration.pool(logits).dtype == torch.float32


def test_any_class_axis_and_any_number_of_rows(monkeypatch):
    logits, y = members(3, 60, 4)
    expected = calibration.member_temperatures(logits, y)
    image = logits.reshape(3, 10, 6, 4).movedim(-1, 1)  # (N, C, H, W)
    found = calibration.member_temperatures(image, y.reshape(10, 6), dim=1)
    torch.testing.assert_close(found, expected)
    found = calibration.pooled_temperature(image, y.reshape(10, 6), dim=1)
    torch.testing.assert_close(found, calibration.pooled_temperature(logits, y))
    monkeypatch.setattr(calibration, "_CHUNK", 7 * 12)  # seven rows at a time
    torch.testing.assert_close(calibration.member_temperatures(logits, y), expected)


def test_apply_divides_members_and_not_classes():
    logits, _ = members(3, 3, 3)  # as many members as rows and classes
    t = torch.tensor([1.0, 2.0, 4.0]).double()
    scaled = calibration.apply(logits, t)
    for i in range(3):
        torch.testing.assert_close(scaled[i], logits[i] / t[i])
    torch.testing.assert_close(calibration.apply(logits, t[1]), logits / 2)
    torch.testing.assert_close(calibration.apply(logits, t.tolist()), scaled)
    with pytest.raises(
        ValueError,
        match=r"^calibration\.apply: logits of shape \(3, 3, 3\) need 3 temperatures, one for each"
        r" member, or a single one of shape \(\); got shape \(2,\)",
    ):
        calibration.apply(logits, t[:2])


def test_pool_is_the_average_of_probabilities():
    logits, _ = members(3, 10, 4)
    torch.testing.assert_close(calibration.pool(logits).exp(), combine.probabilities(logits))
    expected = combine.weighted(logits.softmax(-1), [1, 0, 2])
    torch.testing.assert_close(calibration.pool(logits, weights=[1, 0, 2]).exp(), expected)
    sure = torch.tensor([[[0.0, -300.0]], [[0.0, -400.0]]])
    assert calibration.pool(sure)[0, 1] == pytest.approx(-300 + math.log(0.5))


@pytest.mark.parametrize(
    "function", [calibration.member_temperatures, calibration.pooled_temperature]
)
def test_errors(function):
    logits, y = members(3, 10, 4)
    here = rf"^calibration\.{function.__name__}: "
    with pytest.raises(TypeError, match=here + "expected one tensor of outputs, got tuple"):
        function((logits,), y)
    with pytest.raises(ValueError, match=here + r"outputs of shape .* got \(9,\)"):
        function(logits, y[:9])
    with pytest.raises(
        ValueError, match=here + "targets are classes from 0 to 3, but they go from"
    ):
        function(logits, y + 4)
    with pytest.raises(ValueError, match=here + r"outputs have .* \(3, 0, 4\)"):
        function(logits[:, :0], y[:0])
    for value in (math.nan, math.inf):
        bad = logits.clone()
        bad[2, 5, 0] = value
        with pytest.raises(ValueError, match=here + "member 2 among 3 has outputs that are NaN or"):
            function(bad, y)


def test_errors_about_weights():
    logits, y = members(3, 10, 4)
    with pytest.raises(
        ValueError, match=r"3 members need weights of shape \(3,\), got shape \(2,\)"
    ):
        calibration.pooled_temperature(logits, y, weights=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"need 3 temperatures, .* got shape \(4,\)"):
        calibration.pooled_temperature(logits, y, temperatures=torch.ones(4))
    with pytest.raises(ValueError, match=r"^calibration\.pool: dim=0 is the member axis of"):
        calibration.pool(logits, dim=0)
