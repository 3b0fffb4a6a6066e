import numpy as np
import pytest
import torch
from torch import nn

from unisono import uncertainty
from unisono.estimators import EnsembleRegressor, Standardise
from unisono.estimators.losses import gaussian_loss, mixture_moments

RNG = np.random.default_rng(0)
X = RNG.uniform(-2, 2, size=(300, 2))
NOISE = 0.1 + 0.9 * (X[:, 0] > 0)  # the right half is noisy
Y = 1000 + 50 * (np.sin(2 * X[:, 0]) + X[:, 1] + NOISE * RNG.normal(size=300))
SMALL = {"n_members": 3, "max_epochs": 4, "hidden_layer_sizes": (8,), "random_state": 0}


def point_net(n_features, n_outputs):
    return nn.Sequential(Standardise(n_features), nn.Linear(n_features, n_outputs))


@pytest.fixture(scope="module")
def fitted():
    return EnsembleRegressor(n_members=4, random_state=0, learning_rate=1e-2).fit(X, Y)


def test_predictions_equal_the_loop_over_the_members(fitted):
    with torch.no_grad():
        each = [member(torch.from_numpy(X)) for member in fitted.ensemble_]
    mean = torch.stack([own[0][:, 0] for own in each]) * Y.std() + Y.mean()
    variance = torch.stack([own[1][:, 0] for own in each]) * Y.var()
    np.testing.assert_allclose(fitted.predict(X), mean.mean(0), rtol=1e-7)
    for own, truth in zip(fitted.predict_members(X), (mean, variance), strict=True):
        np.testing.assert_allclose(own, truth, rtol=1e-7)
    found = fitted.predict_uncertainty(X)
    for own, truth in zip(found, uncertainty.regression(mean, variance), strict=True):
        np.testing.assert_allclose(own, truth, rtol=1e-6)
    np.testing.assert_allclose(found.prediction, fitted.predict(X), rtol=1e-12)


def test_it_learns_where_the_noise_is(fitted):
    assert fitted.score(X, Y) > 0.7
    found = fitted.predict_uncertainty(X)
    spread = np.sqrt(found.aleatoric) / 50
    assert spread[X[:, 0] > 0.3].mean() > 2 * spread[X[:, 0] < -0.3].mean()
    assert 0.5 < spread[X[:, 0] > 0.3].mean() < 1.5  # the truth is 1
    far = fitted.predict_uncertainty(X * 10)
    assert np.median(far.epistemic) > 10 * np.median(found.epistemic)


def test_members_that_predict_points_have_no_aleatoric_uncertainty():
    model = EnsembleRegressor(point_net, **SMALL, dtype="float32").fit(X, Y)
    found = model.predict_uncertainty(X)
    assert (found.aleatoric == 0).all()
    np.testing.assert_allclose(found.total, found.epistemic)
    mean, variance = model.predict_members(X)
    assert variance is None
    np.testing.assert_allclose(model.predict(X), mean.mean(0), rtol=1e-6)
    assert model.predict(X).dtype == np.float64  # the unit of y needs it


def test_several_targets_have_scales_of_their_own():
    two = np.stack([Y, 1e-6 * X[:, 1]], 1)
    model = EnsembleRegressor(n_members=2, random_state=0, learning_rate=1e-2).fit(X, two)
    assert model.predict(X).shape == (300, 2)
    np.testing.assert_allclose(model.target_scale_, two.std(0))
    assert model.score(X, two) > 0.7
    assert model.predict_uncertainty(X).total.shape == (300, 2)
    assert model.predict_members(X)[1].shape == (2, 300, 2)


def test_the_unit_of_the_target_does_not_matter():
    one = EnsembleRegressor(**SMALL).fit(X, Y)
    other = EnsembleRegressor(**SMALL).fit(X, 1e6 * Y - 3)
    np.testing.assert_allclose(other.predict(X), 1e6 * one.predict(X) - 3, rtol=1e-6)
    found = other.predict_uncertainty(X).total
    np.testing.assert_allclose(found, 1e12 * one.predict_uncertainty(X).total, rtol=1e-5)


def test_a_constant_target_is_predicted():
    model = EnsembleRegressor(**{**SMALL, "max_epochs": 30}).fit(X, np.full(300, 7.0))
    np.testing.assert_allclose(model.predict(X), 7, atol=0.7)


@pytest.mark.parametrize("module", [None, point_net], ids=["default", "points"])
def test_a_row_of_weight_two_counts_like_two(module):
    weights = RNG.integers(0, 4, size=60)
    options = {**SMALL, "max_epochs": 30, "batch_size": 1000, "patience": None}
    x, y = X[:60], Y[:60]
    one = EnsembleRegressor(module, **options).fit(x, y, sample_weight=weights)
    other = EnsembleRegressor(module, **options)
    other.fit(np.repeat(x, weights, axis=0), np.repeat(y, weights))
    np.testing.assert_allclose(one.predict(x), other.predict(x), rtol=1e-6)
    plain = EnsembleRegressor(module, **options).fit(x, y)
    assert not np.allclose(plain.predict(x), one.predict(x), rtol=1e-4)


def test_partial_fit_learns_from_batches():
    model = EnsembleRegressor(n_members=2, random_state=0, learning_rate=1e-2)
    for _ in range(6):
        for start in range(0, 300, 60):
            model.partial_fit(X[start : start + 60], Y[start : start + 60])
    assert model.score(X, Y) > 0.6
    np.testing.assert_allclose(model.target_mean_, Y.mean())
    with pytest.raises(ValueError, match=r"y has 1 targets in the first call; got shape \(60, 2\)"):
        model.partial_fit(X[:60], np.ones((60, 2)))


def test_the_mean_is_learnt_by_squared_errors_and_the_variance_by_likelihood():
    mean = torch.randn(9, 2, dtype=torch.float64, requires_grad=True)
    variance = torch.rand(9, 2, dtype=torch.float64).add(0.1).requires_grad_()
    y, weights = torch.randn(9, 2).double(), torch.rand(9).double()
    loss = gaussian_loss(weighted=True)((mean, variance), (y, weights))
    of_mean, of_variance = torch.autograd.grad(loss, [mean, variance])
    squares = ((mean - y).square().mean(1) * weights).mean() / 2
    torch.testing.assert_close(of_mean, torch.autograd.grad(squares, mean)[0])
    density = torch.distributions.Normal(mean, variance.sqrt()).log_prob(y)
    likelihood = -(density.mean(1) * weights).mean()
    torch.testing.assert_close(of_variance, torch.autograd.grad(likelihood, variance)[0])
    torch.testing.assert_close(
        gaussian_loss(weighted=False)((mean, variance), y),
        gaussian_loss(weighted=True)((mean, variance), (y, torch.ones(9).double())),
    )


def test_the_moments_of_a_mixture():
    mean, variance = torch.tensor([[[0.0]], [[4.0]]]), torch.tensor([[[1.0]], [[3.0]]])
    assert [x.item() for x in mixture_moments((mean, variance))] == [2.0, 6.0]


def test_a_pair_of_other_shapes_is_refused():
    class Pair(nn.Module):
        def __init__(self, n_features, n_outputs):
            super().__init__()
            self.net = nn.Linear(n_features, n_outputs)

        def forward(self, x):
            return self.net(x), x

    with pytest.raises(ValueError, match="a member returns") as caught:
        EnsembleRegressor(Pair, **SMALL).fit(X, Y)
    assert str(caught.value) == (
        "EnsembleRegressor.fit: a member returns (rows, n_outputs), here (2, 1), or a pair of mean"
        " and variance of that shape; got (2, 1) and (2, 2). See the second argument of"
        " module(n_features, n_outputs)"
    )


def test_targets_that_are_not_finite():
    with pytest.raises(ValueError, match="Input y contains NaN"):
        EnsembleRegressor(**SMALL).fit(X, np.full(300, np.nan))
