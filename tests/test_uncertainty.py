"""Uncertainty in two parts: closed forms, scipy's entropies, and what holds for any input."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from unisono import combine, uncertainty
from unisono.uncertainty import (
    Uncertainty,
    classification,
    disagreement_matrix,
    pairwise_disagreement,
    regression,
    variation_ratio,
)

NAN, INF = float("nan"), float("inf")
LN2 = math.log(2)
COUNTS = {
    "variation_ratio": variation_ratio,
    "pairwise_disagreement": pairwise_disagreement,
    "disagreement_matrix": disagreement_matrix,
}
EVERY = {"classification": classification, "regression": regression, **COUNTS}
examples = settings(max_examples=60, deadline=None)


ANY_NUMBER = st.one_of(st.integers(-40, 40).map(float), st.floats(-9, 9))


def tensors(*, min_axes=2, elements=ANY_NUMBER):
    """A float64 tensor with members on axis 0."""

    @st.composite
    def draw_one(draw):
        shape = draw(st.lists(st.integers(1, 5), min_size=min_axes, max_size=4))
        size = math.prod(shape)
        values = draw(st.lists(elements, min_size=size, max_size=size))
        return torch.tensor(values, dtype=torch.float64).reshape(shape)

    return draw_one()


def by_scipy(p, weights=None):
    """The decomposition of probabilities (N, *, C), by scipy's entropies."""
    stats = pytest.importorskip("scipy.stats")
    mean = np.average(p, axis=0, weights=weights)
    aleatoric = np.average(stats.entropy(p, axis=-1), axis=0, weights=weights)
    divergence = stats.entropy(p, np.broadcast_to(mean, p.shape), axis=-1)
    return stats.entropy(mean, axis=-1), aleatoric, np.average(divergence, axis=0, weights=weights)


# Closed forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["logits", "probabilities"])
def test_sure_members_that_contradict_each_other(given):
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = classification(p.log() if given == "logits" else p, given=given)
    assert_close(found.prediction, torch.full((2,), 0.5, dtype=torch.float64))
    assert found.aleatoric == 0
    assert_close(found.epistemic, torch.tensor(LN2, dtype=torch.float64))
    assert found.total == found.epistemic


@pytest.mark.parametrize("members", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_members_that_agree_know_what_they_can(members, dtype):
    logits = torch.randn(1, 50, 10).to(dtype).expand(members, -1, -1)
    found = classification(logits)
    # Of first order in the rounding it would be about 1e-7.
    assert found.epistemic.double().max() < 1e-12
    assert_close(found.total, found.aleatoric)
    assert_close(found.prediction, logits.double().softmax(-1)[0].to(dtype))


def test_unsure_members_that_agree():
    found = classification(torch.zeros(3, 4, dtype=torch.float64))
    assert_close(found.total, torch.tensor(math.log(4), dtype=torch.float64))
    assert found.epistemic == 0


def test_disagreement_is_right_where_it_is_small():
    # Probabilities (1 +- e)/2 have mutual information e**2 / 2 + e**4 / 12 + ...
    for e in (1e-2, 1e-3, 1e-4):
        z = math.log((1 + e) / (1 - e))
        logits = torch.tensor([[z, 0.0], [0.0, z]])  # float32
        expected = torch.tensor(e**2 / 2 + e**4 / 12)
        # The logarithms of the probabilities are right to 1e-7, which is 1e-3 of e = 1e-4.
        assert_close(classification(logits).epistemic, expected, rtol=3e-3, atol=0)


def test_a_mixture_of_gaussians():
    found = regression(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0.5, 1.0, 3.0]))
    assert_close(found, Uncertainty(*map(torch.tensor, (4.0, 1.5 + 26 / 3, 1.5, 26 / 3))))
    draws = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(3)),
        torch.distributions.Normal(torch.tensor([1.0, 3.0, 8.0]), torch.tensor([0.5, 1, 3]).sqrt()),
    )
    assert_close(found.prediction, draws.mean)
    assert_close(found.total, draws.variance)


def test_points_state_no_variance():
    found = regression(torch.tensor([[1.0], [3.0]]))
    assert found == (2.0, 1.0, 0.0, 1.0)


def test_equal_predictions_have_no_spread_however_large():
    for number in (0.1, 1e30, -123456.789):
        found = regression(torch.full((3, 2), number))
        assert (found.epistemic == 0).all()
        assert (found.prediction == torch.tensor(number)).all()
    far = torch.tensor([1e6, 1e6 + 1], dtype=torch.float32)
    assert regression(far).epistemic == 0.25


def test_the_standard_names():
    found = classification(torch.zeros(2, 3))
    assert found._fields == ("prediction", "total", "aleatoric", "epistemic")


# For any input ------------------------------------------------------------------------------------


@given(tensors(), st.data())
@examples
def test_classification_equals_scipy(x, data):
    n = len(x)
    weights = data.draw(st.none() | st.lists(st.integers(0, 4), min_size=n, max_size=n).filter(any))
    p = x.softmax(-1)
    total, aleatoric, epistemic = map(
        torch.from_numpy, map(np.asarray, by_scipy(p.numpy(), weights))
    )
    expected = combine.weighted(p, weights or [1.0] * n)
    moved = classification(x.movedim(-1, 1), dim=1, weights=weights)
    moved = moved._replace(prediction=moved.prediction.movedim(0, -1))
    for found in (
        classification(x, weights=weights),
        classification(p, given="probabilities", weights=weights),
        moved,
        classification(
            x.log_softmax(-1), weights=None if weights is None else torch.tensor(weights)
        ),
    ):
        assert_close(found.prediction, expected)
        # scipy's differences of entropies are right to 1e-15 or so, not relative to themselves.
        assert_close(found.total, total, rtol=1e-7, atol=1e-12)
        assert_close(found.aleatoric, aleatoric, rtol=1e-7, atol=1e-12)
        assert_close(found.epistemic, epistemic, rtol=1e-7, atol=1e-12)


@given(tensors(min_axes=1), st.data())
@examples
def test_regression_equals_numpy(x, data):
    n = len(x)
    weights = data.draw(st.none() | st.lists(st.integers(0, 4), min_size=n, max_size=n).filter(any))
    variance = x.abs()
    mean = np.average(x.numpy(), axis=0, weights=weights)
    epistemic = np.average((x.numpy() - mean) ** 2, axis=0, weights=weights)
    aleatoric = np.average(variance.numpy(), axis=0, weights=weights)
    found = regression(x, variance, weights=weights)
    expected = (mean, epistemic + aleatoric, aleatoric, epistemic)
    for part, wanted in zip(found, expected, strict=True):
        assert_close(part, torch.from_numpy(np.asarray(wanted)), rtol=1e-7, atol=1e-9)
    points = regression(x, weights=weights)
    assert_close(points.total, points.epistemic)
    assert_close(points.epistemic, found.epistemic)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(x=tensors(elements=st.floats(-30, 30) | st.just(-INF)), order=st.randoms())
@examples
def test_what_holds_for_every_dtype(dtype, x, order):
    x = x.to(dtype)
    x[..., 0].clamp_(min=-9)  # a class that is possible
    found = classification(x)
    assert all(part.dtype == dtype for part in found)
    assert (found.epistemic >= 0).all()
    assert (found.aleatoric >= 0).all()
    most = 1 + 4 * torch.finfo(dtype).eps
    assert (found.epistemic <= math.log(len(x)) * most + 1e-7).all()
    assert (found.total <= math.log(x.shape[-1]) * most + 1e-6).all()
    assert_close(found.total, found.aleatoric + found.epistemic)
    members = list(range(len(x)))
    order.shuffle(members)
    narrow = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {}
    assert_close(classification(x[members]), found, **narrow)


@given(tensors(elements=st.integers(0, 3)), st.data())
@examples
def test_counts_equal_counting(x, data):
    x[0].flatten()[0] = data.draw(st.sampled_from([NAN, 1.0]))
    labels = x.argmax(-1).masked_fill(x.isnan().any(-1), -1)
    n = len(x)
    flat = labels.reshape(n, -1)
    ratio, pairs = [], []
    for column in flat.T.tolist():
        votes = [label for label in column if label >= 0]
        most = max((votes.count(label) for label in votes), default=0)
        ratio.append(1 - most / len(votes) if votes else NAN)
        both = [(a, b) for i, a in enumerate(votes) for b in votes[:i]]
        pairs.append(sum(a != b for a, b in both) / len(both) if both else 0.0)
    matrix = torch.empty(n, n)
    for i in range(n):
        for j in range(n):
            both = (flat[i] >= 0) & (flat[j] >= 0)
            matrix[i, j] = (flat[i] != flat[j])[both].float().mean()
    for source, dtype in ((x, torch.float64), (labels, torch.float32)):
        as_wanted = {"equal_nan": True, "check_dtype": False, "rtol": 1e-6, "atol": 1e-6}
        assert_close(variation_ratio(source).flatten(), torch.tensor(ratio), **as_wanted)
        assert_close(pairwise_disagreement(source).flatten(), torch.tensor(pairs), **as_wanted)
        assert_close(disagreement_matrix(source), matrix, **as_wanted)
        assert {fn(source).dtype for fn in COUNTS.values()} == {dtype}


def test_pairs_and_matrix_tell_the_same():
    labels = torch.randint(3, (6, 40))
    matrix = disagreement_matrix(labels)
    off_diagonal = matrix.sum() / (6 * 5)
    assert_close(pairwise_disagreement(labels).mean(), off_diagonal)
    assert pairwise_disagreement(labels[:1]).eq(0).all()
    assert variation_ratio(labels[:1]).eq(0).all()


# Extremes -----------------------------------------------------------------------------------------


def test_logits_far_apart():
    far = torch.tensor([[[1e4, 0.0, -1e4]], [[-1e4, 0.0, 1e4]]], requires_grad=True)
    found = classification(far)
    assert_close(found.epistemic, torch.tensor([LN2]))
    sum(part.sum() for part in found).backward()
    assert far.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradients_at_the_border_are_numbers(dtype):
    logits = torch.tensor([[0.0, -INF, 1.0], [0.0, -INF, -INF], [2.0, 2.0, 2.0]], dtype=dtype)
    logits.requires_grad_()
    probabilities = logits.detach().softmax(-1).requires_grad_()
    classification(logits).epistemic.backward()
    classification(probabilities, given="probabilities").epistemic.backward()
    assert logits.grad.isfinite().all()
    assert probabilities.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:Casting complex")
def test_gradients():
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    w = torch.rand(4, dtype=torch.float64, requires_grad=True)
    v = torch.rand(4, 2, 3, dtype=torch.float64, requires_grad=True)

    def normalised(x):
        return classification(x.softmax(-1), given="probabilities")

    assert torch.autograd.gradcheck(classification, x)
    assert torch.autograd.gradcheck(lambda x, w: classification(x, weights=w), (x, w))
    assert torch.autograd.gradcheck(normalised, x)
    assert torch.autograd.gradcheck(lambda x, v, w: regression(x, v, weights=w), (x, v, w))


def test_half_precision_is_computed_in_float32():
    x = 3 * torch.randn(5, 200, 50)
    for dtype in (torch.float16, torch.bfloat16):
        exact = classification(x.to(dtype).double())
        # Rounded once, at the end.
        assert_close(classification(x.to(dtype)), Uncertainty(*(e.to(dtype) for e in exact)))
    halves = regression(torch.tensor([6e4, 6e4 - 32], dtype=torch.float16))
    assert halves.prediction == 6e4 - 32 or halves.prediction == 6e4
    assert halves.epistemic == 256


@pytest.mark.parametrize("place", [0, 1])
def test_nan_of_one_member_shows_in_its_row_only(place):
    x = torch.randn(3, 2, 4)
    x[1, place, 2] = NAN
    for found in (classification(x), classification(x.softmax(-1), given="probabilities")):
        for part in found[1:]:
            assert part.isnan().tolist() == [place == 0, place == 1]
        assert found.prediction[place].isnan().all()
    assert regression(x).epistemic.isnan().sum() == 1


def test_one_member_knows_no_disagreement():
    x = torch.randn(1, 5, 3)
    found = classification(x)
    assert (found.epistemic == 0).all()
    assert_close(found.total, torch.distributions.Categorical(logits=x[0]).entropy())
    assert_close(regression(x, x.square()).total, x[0].square())


def test_no_rows():
    found = classification(torch.empty(3, 0, 4))
    assert [tuple(part.shape) for part in found] == [(0, 4), (0,), (0,), (0,)]
    assert regression(torch.empty(3, 0)).total.shape == (0,)
    assert variation_ratio(torch.empty(3, 0, 4)).shape == (0,)
    assert pairwise_disagreement(torch.empty(3, 0, 4)).shape == (0,)
    assert disagreement_matrix(torch.empty(3, 0, 4)).isnan().all()


def test_inputs_are_left_alone():
    x = torch.randn(3, 4, 2)
    before = x.clone()
    for function in EVERY.values():
        function(x)
    assert torch.equal(x, before)


# Mechanism ----------------------------------------------------------------------------------------


def test_inside_vmap():
    x = torch.rand(3, 5, 2, 4)  # three ensembles of five
    for function in (*EVERY.values(), lambda x: regression(x, x)):
        parts = [function(part) for part in x]
        expected = (
            torch.stack(parts)
            if isinstance(parts[0], torch.Tensor)
            else Uncertainty(*map(torch.stack, zip(*parts, strict=True)))
        )
        assert_close(torch.vmap(function)(x), expected)


def test_no_value_is_read_back_from_the_device():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 2, 3, device="cuda")  # reading a value of a fake tensor raises
        w = torch.zeros(4, device="cuda")
        found = [*classification(x), *classification(x, given="probabilities", weights=w)]
        found += [*regression(x, x, weights=w), *regression(x)]
        found += [function(x) for function in COUNTS.values()]
        found += [function(x.long()) for function in COUNTS.values()]
    assert {each.device.type for each in found} == {"cuda"}


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", EVERY)
def test_compiles_without_graph_breaks(name):
    x = torch.rand(4, 2, 3)
    compiled = torch.compile(EVERY[name], fullgraph=True, backend="eager")
    assert_close(compiled(x), EVERY[name](x))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_checked_values_compile_too():
    p = torch.rand(4, 2, 3).softmax(-1)
    function = torch.compile(
        lambda p: (*classification(p, given="probabilities"), *regression(p, p)),
        fullgraph=True,
        backend="eager",
    )
    assert_close(function(p), (*classification(p, given="probabilities"), *regression(p, p)))


# Messages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_errors_about_the_member_axis(name):
    function = EVERY[name]
    with pytest.raises(
        TypeError,
        match=rf"^uncertainty\.{name}: expected one tensor of outputs, "
        r"got dict; pass the tensor in it that holds the predictions$",
    ):
        function({"logits": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=rf"^uncertainty\.{name}: axis 0 .* is the member, but th"):
        function(torch.tensor(1.0))
    with pytest.raises(ValueError, match=rf"^uncertainty\.{name}: .*\(0, 3\) have no member on ax"):
        function(torch.empty(0, 3))


@pytest.mark.parametrize("name", [name for name in EVERY if name != "regression"])
def test_errors_about_the_class_axis(name):
    with pytest.raises(ValueError, match=rf"^uncertainty\.{name}: dim=0 is the member axis of log"):
        EVERY[name](torch.ones(2, 3), dim=0)
    with pytest.raises(ValueError, match=r"dim=3 is no axis of logits of shape \(2, 3\)"):
        EVERY[name](torch.ones(2, 3), dim=3)


@pytest.mark.parametrize("name", ["classification", "regression"])
def test_errors_about_the_dtype(name):
    message = (
        f"uncertainty.{name}: expected outputs of floating dtype, got torch.int64; labels have an "
        f"uncertainty.variation_ratio"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        EVERY[name](torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=rf"^uncertainty\.{name}: .* real numbers, got torch\.comp"):
        EVERY[name](torch.ones(2, 2, dtype=torch.complex64))


def test_logits_that_pass_for_probabilities():
    message = (
        "uncertainty.classification: probabilities are at least 0 and sum to 1 over the classes on "
        'axis 2, but 3 of 12 are below 0, and 4 of 4 sums differ from 1; pass given="logits" for '
        "logits, or another dim"
    )
    x = torch.tensor([-1.0, -2, -3, 4, 5, 6, 7, 8, 9, 10, 11, 12]).reshape(2, 2, 3)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        classification(x, given="probabilities")
    with pytest.raises(
        ValueError,
        match=r'^uncertainty\.classification: given is "logits" or "probabilities"; got .probs.$',
    ):
        classification(x, given="probs")


def test_errors_about_variances():
    call = "uncertainty.regression"
    x = torch.ones(2, 3)
    with pytest.raises(
        ValueError,
        match=rf"^{call}: each prediction has one variance, but mean has "
        r"shape \(2, 3\) and variance \(2, 1\)$",
    ):
        regression(x, x[:, :1])
    with pytest.raises(
        ValueError,
        match=rf"^{call}: variances are at least 0, but 6 of 6 are below;"
        r" for members that return log-variances: regression\(mean, log_variance\.exp",
    ):
        regression(x, -x)
    for bad, kind in ((1.0, "float"), (x.long(), r"torch\.int64")):
        with pytest.raises(TypeError, match=rf"^{call}: variance is a tensor of .*, got {kind}$"):
            regression(x, bad)


def test_errors_about_weights():
    for name in ("classification", "regression"):
        with pytest.raises(
            ValueError, match=rf"^uncertainty\.{name}: 2 members need weights of sha"
        ):
            EVERY[name](torch.ones(2, 3), weights=[1.0])
        with pytest.raises(
            ValueError, match=rf"^uncertainty\.{name}: .* but weights\[1\] is -1\.0"
        ):
            EVERY[name](torch.ones(2, 3), weights=[1.0, -1.0])


def test_public_names():
    assert set(EVERY) | {"Uncertainty"} <= set(vars(uncertainty))
