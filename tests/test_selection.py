"""Weights from held-out data against slow and independent ways to find them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from unisono import Ensemble, EnsembleWarning, combine, selection, simplex

NAN = float("nan")
examples = settings(max_examples=40, deadline=None)


def classifiers(n, rows, classes, seed=0, dtype=torch.float64):
    """Probabilities of members that differ in quality, and the classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=generator)
    logits = torch.randn(n, rows, classes, generator=generator, dtype=torch.float64)
    skill = 3 * torch.rand(n, 1, 1, generator=generator, dtype=torch.float64)
    logits = logits * 1.5 + skill * F.one_hot(y, classes)
    return logits.softmax(-1).to(dtype), y


def regressors(n, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(rows, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, rows, generator=generator, dtype=torch.float64)
    return y + noise * torch.rand(n, 1, generator=generator, dtype=torch.float64) + 0.3, y


def nll(probabilities, y):
    return float(
        -np.log([p[c] for p, c in zip(probabilities.tolist(), y.tolist(), strict=True)]).mean()
    )


def squared_error(prediction, y):
    return float(np.mean((prediction.numpy() - y.numpy()) ** 2))


def slow_greedy(outputs, y, loss, steps, start=0):
    """As the paper says it, with lists and loops."""
    alone = [loss(output, y) for output in outputs]
    ranking = sorted(range(len(outputs)), key=lambda i: alone[i])
    bag, path = [], []
    for k in range(steps):
        losses = []
        for i in range(len(outputs)):
            losses.append(loss(torch.stack([outputs[j] for j in [*bag, i]]).mean(0), y))
        bag.append(ranking[k] if k < start else int(np.argmin(losses)))
        path.append(losses[bag[-1]])
    best = bag[: int(np.argmin(path)) + 1]
    return torch.tensor([best.count(i) / len(best) for i in range(len(outputs))]).double()


def by_scipy(loss, n):
    """The least loss over the simplex by SLSQP, from several starts."""
    optimize = pytest.importorskip("scipy.optimize")
    results = [
        optimize.minimize(
            loss,
            start,
            method="SLSQP",
            bounds=[(0, 1)] * n,
            constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1}],
            options={"ftol": 1e-14, "maxiter": 1000},
        )
        for start in (np.full(n, 1 / n), *np.random.default_rng(0).dirichlet(np.ones(n), 2))
    ]
    return min(results, key=lambda result: result.fun)


# Greedy selection ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("seed", range(3))
def test_greedy_equals_the_slow_loop(seed, start):
    p, y = classifiers(6, 40, 3, seed)
    found = selection.greedy(p, y, steps=25, start=start)
    torch.testing.assert_close(found, slow_greedy(p, y, nll, 25, start))
    found = selection.greedy(p, y, loss="error", steps=25, start=start)
    expected = slow_greedy(p, y, lambda p, y: (p.argmax(-1) != y).double().mean().item(), 25, start)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_regression_equals_the_slow_loop(seed):
    o, y = regressors(6, 30, seed)
    found = selection.greedy(o, y, loss="squared_error", steps=25)
    torch.testing.assert_close(found, slow_greedy(o, y, squared_error, 25))
    images = selection.greedy(o.reshape(6, 5, 6), y.reshape(5, 6), loss="squared_error", steps=25)
    torch.testing.assert_close(found, images)


def test_greedy_by_any_function():
    p, y = classifiers(5, 30, 3)

    def brier(p, y):
        return (p - F.one_hot(y, 3)).square().sum(-1).mean()

    found = selection.greedy(p, y, loss=brier, steps=20)
    torch.testing.assert_close(found, slow_greedy(p, y, lambda p, y: brier(p, y).item(), 20))
    found = selection.greedy(p, y, loss=lambda p, y: F.nll_loss(p.log(), y), steps=20)
    torch.testing.assert_close(found, selection.greedy(p, y, steps=20))


def test_greedy_by_a_function_that_needs_numpy_runs_member_by_member():
    metrics = pytest.importorskip("sklearn.metrics")
    p, y = classifiers(4, 60, 2)

    def no_auroc(p, y):
        return torch.tensor(1 - metrics.roc_auc_score(y.numpy(), p[:, 1].numpy()))

    with pytest.warns(EnsembleWarning, match="no_auroc"):
        found = selection.greedy(p, y, loss=no_auroc, steps=10)
    expected = slow_greedy(p, y, lambda p, y: no_auroc(p, y).item(), 10)
    torch.testing.assert_close(found, expected)


def test_greedy_counts_the_classes_on_any_axis():
    p, y = classifiers(4, 30, 3)
    flat = selection.greedy(p, y)
    moved = p.reshape(4, 5, 6, 3).movedim(-1, 1)
    torch.testing.assert_close(selection.greedy(moved, y.reshape(5, 6), dim=1), flat)


def test_greedy_takes_the_shortest_best_prefix_and_the_lowest_of_equals():
    p, y = classifiers(1, 20, 3)
    assert selection.greedy(p.repeat(3, 1, 1), y).tolist() == [1, 0, 0]
    assert selection.greedy(p.repeat(3, 1, 1), y, loss="error").tolist() == [1, 0, 0]


def test_greedy_finds_a_pair_whose_errors_cancel():
    y = torch.linspace(-1, 1, 9)
    o = torch.stack([y + 0.4, y + 1, y - 1])
    w = selection.greedy(o, y, loss="squared_error", steps=2)
    assert w.tolist() == [0.5, 0, 0.5]  # the best by itself first, and then what mends it
    w = selection.greedy(o, y, loss="squared_error", steps=100)
    assert squared_error(combine.weighted(o, w), y) < 1e-9


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 3), st.integers(0, 10**6))
@examples
def test_greedy_is_never_worse_than_the_best_member(n, rows, start, seed):
    p, y = classifiers(n, rows, 3, seed)
    w = selection.greedy(p, y, steps=12, start=min(start, n))
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1)
    best = min(nll(member, y) for member in p)
    assert nll(combine.weighted(p, w), y) <= best + 1e-12
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        selection.greedy(p[order], y, steps=12, start=min(start, n)), w[order]
    )


# The best convex combination ----------------------------------------------------------------------


@pytest.mark.parametrize(("n", "rows"), [(2, 5), (5, 60), (12, 200)])
@pytest.mark.parametrize("seed", range(2))
def test_convex_nll_equals_scipy(n, rows, seed):
    p, y = classifiers(n, rows, 4, seed)
    likely = p[:, torch.arange(rows), y].numpy()
    best = by_scipy(lambda w: -np.log(np.maximum(w, 0) @ likely).mean(), n)
    w = selection.convex_weights(p, y)
    assert nll(combine.weighted(p, w), y) <= best.fun + 1e-9
    torch.testing.assert_close(w, torch.from_numpy(best.x), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("n", "rows"), [(2, 5), (5, 60), (12, 200)])
@pytest.mark.parametrize("seed", range(2))
def test_convex_squared_error_equals_scipy(n, rows, seed):
    o, y = regressors(n, rows, seed)
    best = by_scipy(lambda w: squared_error(torch.from_numpy(w) @ o, y), n)
    w = selection.convex_weights(o, y, loss="squared_error")
    assert squared_error(combine.weighted(o, w), y) <= best.fun + 1e-9
    torch.testing.assert_close(w, torch.from_numpy(best.x), atol=1e-4, rtol=0)


def test_mixture_of_densities_equals_scipy():
    o, y = regressors(5, 80)
    log_p = torch.distributions.Normal(o, 0.5).log_prob(y)
    best = by_scipy(lambda w: -np.log(np.maximum(w, 0) @ log_p.exp().numpy()).mean(), 5)
    w = selection.mixture_weights(log_p)
    found = -torch.logsumexp(log_p + w.log().unsqueeze(1), 0).mean()
    assert found <= best.fun + 1e-9
    torch.testing.assert_close(w, torch.from_numpy(best.x), atol=1e-4, rtol=0)


def test_densities_far_below_rounding_have_weights_too():
    log_p = torch.tensor([[-5000.0, -5000.0, -9000.0], [-6000.0, -6000.0, -8000.0]])
    torch.testing.assert_close(
        selection.mixture_weights(log_p), torch.tensor([2 / 3, 1 / 3]), atol=1e-5, rtol=0
    )


def test_a_perfect_member_gets_all_the_weight():
    p, y = classifiers(5, 40, 3)
    p[3] = F.one_hot(y, 3).double()
    for w in (selection.greedy(p, y), selection.convex_weights(p, y)):
        assert w.tolist() == [0, 0, 0, 1, 0]
    o, numbers = regressors(5, 40)
    o[3] = numbers
    assert selection.greedy(o, numbers, loss="squared_error").tolist() == [0, 0, 0, 1, 0]
    w = selection.convex_weights(o, numbers, loss="squared_error")
    # At a minimum of zero the loss is flat: 1e-9 of it is 3e-5 of a weight.
    torch.testing.assert_close(w, torch.tensor([0, 0, 0, 1.0, 0]).double(), atol=1e-3, rtol=0)


def test_identical_members_share_the_weight():
    p, y = classifiers(1, 40, 3)
    w = selection.convex_weights(p.repeat(4, 1, 1), y)
    torch.testing.assert_close(w, torch.full((4,), 0.25).double())
    other, _ = classifiers(2, 40, 3, seed=1)
    single = selection.convex_weights(torch.cat([p, other]), y)
    twice = selection.convex_weights(torch.cat([p, p, other]), y)
    torch.testing.assert_close(twice[0], twice[1])
    torch.testing.assert_close(twice[:2].sum(), single[0], atol=1e-4, rtol=0)


def test_probabilities_of_zero_and_one():
    y = torch.tensor([0, 1, 1, 0])
    one = F.one_hot(torch.tensor([0, 1, 0, 0]), 2).double()
    two = F.one_hot(torch.tensor([1, 1, 1, 0]), 2).double()
    p = torch.stack([one, two, F.one_hot(1 - y, 2).double()])
    # Each of the first two is impossible in one row, so both are needed; the third is needed never.
    torch.testing.assert_close(selection.convex_weights(p, y), torch.tensor([0.5, 0.5, 0]).double())
    torch.testing.assert_close(selection.greedy(p, y), torch.tensor([0.5, 0.5, 0]).double())


def test_rows_that_are_impossible_for_all_say_nothing():
    p, y = classifiers(3, 30, 3)
    lost = torch.eye(3).double()[(y[:1] + 1) % 3].expand(3, 1, 3)
    more, labels = torch.cat([p, lost], 1), torch.cat([y, y[:1]])
    torch.testing.assert_close(
        selection.convex_weights(more, labels), selection.convex_weights(p, y), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(selection.greedy(more, labels), selection.greedy(p, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    p, y = classifiers(4, 50, 3)
    o, numbers = regressors(4, 50)
    wide = torch.promote_types(dtype, torch.float32)
    for function, outputs, targets, options in (
        (selection.greedy, p, y, {}),
        (selection.greedy, p, y, {"loss": "error"}),
        (selection.greedy, o, numbers, {"loss": "squared_error"}),
        (selection.convex_weights, p, y, {}),
        (selection.convex_weights, o, numbers, {"loss": "squared_error"}),
        (selection.mixture_weights, p[:, torch.arange(50), y].log(), None, {}),
    ):
        rounded = outputs.to(dtype)
        given = () if targets is None else (targets,)
        found = function(rounded, *given, **options)
        assert found.dtype == wide
        exact = function(rounded.double(), *given, **options)
        torch.testing.assert_close(found, exact.to(wide))


def test_a_single_member_and_a_single_row():
    p, y = classifiers(1, 1, 3)
    assert selection.greedy(p, y).tolist() == [1]
    assert selection.convex_weights(p, y).tolist() == [1]
    p, y = classifiers(4, 1, 3)
    best = int(p[:, 0, y[0]].argmax())
    assert selection.greedy(p, y)[best] == 1
    assert selection.convex_weights(p, y)[best] == pytest.approx(1, abs=1e-6)


def test_one_class_in_the_targets():
    p, _ = classifiers(4, 30, 3)
    y = torch.zeros(30, dtype=torch.int64)
    assert nll(combine.weighted(p, selection.convex_weights(p, y)), y) <= min(
        nll(member, y) for member in p
    )


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6))
@examples
def test_convex_weights_are_the_best_of_all(n, rows, seed):
    p, y = classifiers(n, rows, 3, seed)
    w = selection.convex_weights(p, y)
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1)
    reached = nll(combine.weighted(p, w), y)
    others = torch.distributions.Dirichlet(torch.ones(n).double()).sample((20,))
    for other in (*torch.eye(n).double(), selection.greedy(p, y), *others):
        assert reached <= nll(combine.weighted(p, other), y) + 2e-9
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    again = selection.convex_weights(p[order], y)
    assert nll(combine.weighted(p[order], again), y) == pytest.approx(reached, abs=2e-9)


def test_many_members():
    p, y = classifiers(200, 500, 5)
    w = selection.convex_weights(p, y)
    likely = p[:, torch.arange(500), y]
    # The optimality conditions, where w is zero and where it isn't.
    slope = (likely / (w @ likely)).mean(1)
    assert slope.max() < 1 + 1e-8
    assert (slope[w > 1e-3] - 1).abs().max() < 1e-5
    assert (w == 0).sum() > 100


def test_a_tolerance_below_rounding_is_an_error(monkeypatch):
    p, y = classifiers(5, 40, 3)
    monkeypatch.setattr(simplex, "_MOST_STEPS", 2)
    with pytest.raises(
        ValueError,
        match=r"^selection\.convex_weights: the loss is within .* after 2 steps .*1\.0e-09",
    ):
        selection.convex_weights(p, y)
    with pytest.raises(ValueError, match="tolerance is a number above zero, got 0"):
        selection.convex_weights(p, y, tolerance=0)


# The whole way ------------------------------------------------------------------------------------


def test_weights_are_those_of_combine_and_of_the_ensemble():
    ens = Ensemble.build(lambda: torch.nn.Linear(4, 3), 5)
    x, y = torch.randn(50, 4), torch.randint(3, (50,))
    p = ens(x).softmax(-1)
    w = selection.greedy(p, y)
    assert not w.requires_grad
    ens.combination.set(weights=w)
    torch.testing.assert_close(ens.combination.probabilities(ens(x)), combine.weighted(p, w))


def test_greedy_waits_for_the_device_once_at_the_end(monkeypatch):
    p, y = classifiers(5, 40, 3)
    asked = []
    truth = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda t: asked.append(t) or truth(t))
    selection.greedy(p, y, steps=10)
    few = len(asked)
    selection.greedy(p, y, steps=50)
    assert len(asked) == 2 * few


# Messages -----------------------------------------------------------------------------------------

CALLS = {
    "greedy": selection.greedy,
    "convex_weights": selection.convex_weights,
}


@pytest.mark.parametrize("name", CALLS)
def test_errors_about_outputs(name):
    call, (p, y) = CALLS[name], classifiers(4, 10, 3)
    here = rf"^selection\.{name}: "
    with pytest.raises(TypeError, match=here + "expected one tensor of outputs, got list"):
        call([p], y)
    with pytest.raises(ValueError, match=here + r".* at least one of each, but .* is \(0, 10, 3\)"):
        call(p[:0], y)
    with pytest.raises(ValueError, match=here + r".* at least one of each, but .* is \(4,\)"):
        call(p[:, 0, 0], y)
    with pytest.raises(TypeError, match=here + r".* floating-point numbers, got torch\.int64"):
        call(p.long(), y)
    for value in (NAN, math.inf, -math.inf):
        q = p.clone()
        q[1, 3, 0] = q[3, 0, 0] = value
        with pytest.raises(
            ValueError,
            match=here + r"members 1, 3 among 4 have outputs that are NaN(.|\n)*ens\[keep\]",
        ):
            call(q, y)
        q[3] = p[3]
        with pytest.raises(ValueError, match=here + "member 1 among 4 has outputs that are NaN"):
            call(q, y)
        # And what the message says helps.
        keep = q.isfinite().flatten(1).all(1)
        assert call(q[keep], y).shape == (3,)


@pytest.mark.parametrize("name", CALLS)
def test_errors_about_targets(name):
    call, (p, y) = CALLS[name], classifiers(4, 10, 3)
    here = rf"^selection\.{name}: "
    with pytest.raises(
        ValueError,
        match=here + r"outputs of shape \(4, 10, 3\) with the classes on axis -1 need targets of"
        r" shape \(10,\), got \(9,\)",
    ):
        call(p, y[:-1])
    with pytest.raises(TypeError, match=here + "targets are a tensor of classes, got list"):
        call(p, y.tolist())
    with pytest.raises(TypeError, match=here + r"targets are classes.*got torch\.float32"):
        call(p, y.float())
    with pytest.raises(
        ValueError, match=here + "targets are classes from 0 to 2, but they go from 0 to 3"
    ):
        call(p, y + (y == 2))
    with pytest.raises(
        ValueError, match=here + "targets are classes from 0 to 2, but they go from -100 to"
    ):
        call(p, torch.where(y == 0, -100, y))
    with pytest.raises(ValueError, match=here + r"dim=0 is no class axis of outputs of shape \(4,"):
        call(p, y, dim=0)
    with pytest.raises(ValueError, match=here + "loss is one of 'nll'.* got 'brier'"):
        call(p, y, loss="brier")
    with pytest.raises(ValueError, match=here + r"outputs of .*\(4, 10, 3\) need targets of shape"):
        call(p, y.float(), loss="squared_error")
    with pytest.raises(TypeError, match=here + "targets are a tensor of numbers, got list"):
        call(p, [1.0], loss="squared_error")
    with pytest.raises(ValueError, match=here + "targets are finite, but some are NaN"):
        call(p, torch.full((10, 3), NAN), loss="squared_error")


@pytest.mark.parametrize("name", CALLS)
def test_logits_are_no_probabilities(name):
    p, y = classifiers(4, 10, 3)
    q = torch.stack([p[0], p[1].log(), p[2], 2 * p[3]])
    with pytest.raises(
        ValueError, match=r"those of members 1, 3 aren't; of logits take outputs\.softmax\(-1\)"
    ):
        CALLS[name](q, y)
    many = torch.randn(20, 10, 3)
    with pytest.raises(ValueError, match=r"members 0, 1, 2, 3, 4, 5, 6, 7 and 12 more aren't"):
        CALLS[name](many, y)


def test_errors_about_steps():
    p, y = classifiers(4, 10, 3)
    with pytest.raises(
        ValueError,
        match=r"^selection\.greedy: steps is a number of steps, at least 1; got 0; start is a"
        r" number of members, from 0 to 4; got 5$",
    ):
        selection.greedy(p, y, steps=0, start=5)
    with pytest.raises(ValueError, match=r"at least 1; got 2\.0"):
        selection.greedy(p, y, steps=2.0)
    assert torch.equal(selection.greedy(p, y, steps=np.int64(7)), selection.greedy(p, y, steps=7))
    with pytest.raises(ValueError, match=r"loss of every combination is NaN or infinite"):
        selection.greedy(p, y, loss=lambda p, y: (p * NAN).sum())


def test_a_loss_that_is_nan_for_some_is_never_chosen():
    o = torch.tensor([[-1.0, -1.0], [2.0, 2.0], [3.0, 3.0]])
    w = selection.greedy(o, torch.zeros(2), loss=lambda o, y: (o.sqrt() - y).square().mean())
    assert w[0] < 1
    assert combine.weighted(o, w).min() >= 0


def test_errors_of_mixtures():
    with pytest.raises(ValueError, match=r"mixture_weights: member 0 among 2 has outputs that are"):
        selection.mixture_weights(torch.tensor([[math.inf], [0.0]]))
    with pytest.raises(
        ValueError,
        match=r"^selection\.mixture_weights: every member gives probability zero to all 3 targets",
    ):
        selection.mixture_weights(torch.full((2, 3), -math.inf))
