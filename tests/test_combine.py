import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono import combine

FUNCTIONS = {
    "mean": combine.mean,
    "median": combine.median,
    "weighted": lambda outputs: combine.weighted(outputs, [1.0] * len(outputs)),
    "probabilities": combine.probabilities,
    "vote": combine.vote,
}
NAN = float("nan")
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
examples = settings(max_examples=60, deadline=None)


@st.composite
def outputs(draw, min_axes=1):
    """A float64 tensor with members on axis 0; few different values, so that ties are common."""
    shape = draw(st.lists(st.integers(1, 5), min_size=min_axes, max_size=4))
    size = math.prod(shape)
    values = draw(st.lists(st.integers(-6, 6), min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float64).reshape(shape) / 2


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def slow_vote(choices):
    """The most frequent of the labels >= 0 along axis 0, of equals the lowest; -1 without any."""
    result = np.empty(choices.shape[1:], dtype=np.int64)
    for index in np.ndindex(*result.shape):
        labels = choices[(slice(None), *index)]
        counts = np.bincount(labels[labels >= 0], minlength=1)
        result[index] = counts.argmax() if counts.max() else -1
    return result


def assert_equals(found, expected):
    expected = torch.as_tensor(np.asarray(expected))
    torch.testing.assert_close(found, expected, equal_nan=True)


@given(outputs())
@examples
def test_mean_and_median_equal_numpy(x):
    assert_equals(combine.mean(x), x.numpy().mean(0))
    assert_equals(combine.median(x), np.median(x.numpy(), axis=0))


@given(outputs(), st.data())
@examples
def test_weighted_equals_numpy(x, data):
    n = len(x)
    weights = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n).filter(any))
    expected = np.average(x.numpy(), axis=0, weights=weights)
    assert_equals(combine.weighted(x, weights), expected)
    for dtype in (torch.float32, torch.float64, torch.int64):
        assert_equals(combine.weighted(x, torch.tensor(weights, dtype=dtype)), expected)
    assert_equals(combine.weighted(x, np.array(weights)), expected)


@given(outputs(min_axes=2), st.data())
@examples
def test_probabilities_equal_numpy(x, data):
    dim = data.draw(st.integers(1, x.ndim - 1))
    expected = softmax(x.numpy(), dim).mean(0)
    assert_equals(combine.probabilities(x, dim), expected)
    assert_equals(combine.probabilities(x, dim - x.ndim), expected)


@given(outputs(min_axes=2), st.data())
@examples
def test_vote_equals_counting(x, data):
    dim = data.draw(st.integers(1, x.ndim - 1))
    expected = slow_vote(x.numpy().argmax(dim))
    assert_equals(combine.vote(x, dim), expected)
    assert_equals(combine.vote(x, dim - x.ndim), expected)


@given(outputs())
@examples
def test_vote_of_labels_equals_counting(x):
    labels = (2 * x).long()
    assert_equals(combine.vote(labels), slow_vote(labels.numpy()))


def test_the_median_of_an_even_number_is_the_average_of_the_middle_two():
    x = torch.tensor([4.0, 1.0, 2.0, 99.0])
    assert combine.median(x) == 3.0
    assert x.median() == 2.0  # torch takes the lower


def test_the_median_does_not_overflow():
    x = torch.full((2,), 60000.0, dtype=torch.float16)
    assert combine.median(x) == 60000.0
    assert combine.median(torch.full((4,), float("inf"))) == float("inf")


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_nan_of_one_member_shows(n):
    x = torch.zeros(n, 2)
    x[1, 0] = NAN
    for name in ("mean", "median", "weighted"):
        result = FUNCTIONS[name](x)
        assert result[0].isnan()
        assert result[1] == 0
    assert combine.probabilities(x).isnan().all()
    assert combine.weighted(x, [1.0] + [0.0] * (n - 1))[0].isnan()


def test_ties_go_to_the_lowest_class():
    one, two = [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    assert combine.vote(torch.tensor([two, one])) == 1
    assert combine.vote(torch.tensor([one, two])) == 1
    assert combine.vote(torch.tensor([two, one, two])) == 2
    assert combine.vote(torch.tensor([7, 3, 7, 3, 9])) == 3
    # Inside one member, too, whatever the number of classes.
    for classes in (2, 3, 17, 1000):
        assert combine.vote(torch.ones(3, classes)) == 0


def test_a_member_with_nan_abstains():
    lost, sure = [NAN, 0.0, 0.0], [0.0, 0.0, 9.0]
    assert combine.vote(torch.tensor([lost, lost, sure])) == 2
    assert combine.vote(torch.tensor([lost, lost])) == -1
    assert combine.vote(torch.tensor([-100, -100, 4])) == 4
    assert combine.vote(torch.tensor([-100, -3])) == -1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_dtypes(name, dtype):
    x = torch.randn(5, 3, 4, dtype=dtype)
    result = FUNCTIONS[name](x)
    assert result.dtype == (torch.int64 if name == "vote" else dtype)
    exact = FUNCTIONS[name](x.double())
    torch.testing.assert_close(result, exact.to(result.dtype))


def test_half_probabilities_are_averaged_in_float32():
    x = torch.randn(3, 1000, dtype=torch.float16)
    exact = combine.probabilities(x.double()).half()
    # Rounding each member by itself would change every fifth probability or so.
    assert (combine.probabilities(x) != exact).sum() < 10


def test_complex_outputs_have_an_average():
    x = torch.randn(3, 2, dtype=torch.complex64)
    torch.testing.assert_close(combine.mean(x), (x[0] + x[1] + x[2]) / 3)
    torch.testing.assert_close(combine.weighted(x, [0, 2, 0]), x[1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_labels_of_any_integer_dtype_can_be_voted_on(dtype):
    result = combine.vote(torch.tensor([1, 0, 1], dtype=dtype))
    assert result == 1
    assert result.dtype == torch.int64


def test_gradients():
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    w = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(combine.mean, x)
    assert torch.autograd.gradcheck(combine.median, x)
    assert torch.autograd.gradcheck(combine.probabilities, x)
    assert torch.autograd.gradcheck(combine.weighted, (x, w))


def test_inside_vmap():
    x = torch.randn(3, 5, 2, 4)  # three ensembles of five
    w = torch.rand(3, 5)
    for function in FUNCTIONS.values():
        expected = torch.stack([function(part) for part in x])
        torch.testing.assert_close(torch.vmap(function)(x), expected)
    expected = torch.stack([combine.weighted(*pair) for pair in zip(x, w, strict=True)])
    torch.testing.assert_close(torch.vmap(combine.weighted)(x, w), expected)


def test_no_value_is_read_back_from_the_device():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 2, 3, device="cuda")  # reading a value of a fake tensor raises
        weights = torch.zeros(4)
        results = [function(x) for function in FUNCTIONS.values()]
        results += [
            combine.weighted(x, weights),
            combine.weighted(x, torch.zeros(4, device="cuda")),
        ]
        results += [combine.vote(x.long())]
    assert {result.device.type for result in results} == {"cuda"}


def test_weights_on_another_device_are_not_waited_for(monkeypatch):
    def tolist(tensor):
        raise AssertionError("a value was asked for")

    monkeypatch.setattr(torch._subclasses.FakeTensor, "tolist", tolist)
    with torch._subclasses.FakeTensorMode():
        combine.weighted(torch.empty(2, device="cuda"), torch.zeros(2, device="cuda"))


def test_shape_of_a_single_number_per_member():
    x = torch.tensor([1.0, 3.0])
    for name in ("mean", "median", "weighted"):
        assert FUNCTIONS[name](x).shape == ()
        assert FUNCTIONS[name](x) == 2.0


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiles_without_graph_breaks(name):
    x = torch.randn(4, 2, 3)
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), FUNCTIONS[name](x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_about_the_member_axis(name):
    function = FUNCTIONS[name] if name != "weighted" else lambda x: combine.weighted(x, [1.0])
    with pytest.raises(TypeError, match=rf"^combine\.{name}: .* got list; combine each tensor"):
        function([torch.ones(2, 2)])
    with pytest.raises(ValueError, match=rf"^combine\.{name}: axis 0 .* is the member, but these"):
        function(torch.tensor(1.0))
    with pytest.raises(ValueError, match=rf"^combine\.{name}: outputs of shape \(0, 3\) have no m"):
        function(torch.empty(0, 3))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "vote"])
def test_integers_have_no_average(name):
    with pytest.raises(TypeError, match=r"dtype torch\.int64 can't be averaged; use combine\.vote"):
        FUNCTIONS[name](torch.ones(2, 2, dtype=torch.int64))


@pytest.mark.parametrize("name", ["median", "probabilities", "vote"])
def test_complex_numbers_have_no_order(name):
    with pytest.raises(TypeError, match=rf"^combine\.{name}: .*, got torch\.complex64"):
        FUNCTIONS[name](torch.ones(2, 2, dtype=torch.complex64))


@pytest.mark.parametrize("name", ["probabilities", "vote"])
def test_errors_about_the_class_axis(name):
    function = getattr(combine, name)
    x = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=r"a member axis and a class axis, got shape \(2,\)"):
        function(torch.ones(2))
    for dim in (0, -3):
        with pytest.raises(ValueError, match=rf"dim={dim} is the member axis of logits of shape"):
            function(x, dim)
    for dim in (3, -4):
        with pytest.raises(ValueError, match=rf"dim={dim} is no axis of logits of shape \(2, 3, 4"):
            function(x, dim)
    with pytest.raises(ValueError, match=r"shape \(2, 0\) have no class on axis -1"):
        function(torch.ones(2, 0))


@pytest.mark.parametrize("make", [list, torch.tensor])
def test_errors_about_weights(make):
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"2 members need weights of shape \(2,\), got shape \(3,"):
        combine.weighted(x, make([1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="the 2 weights sum to zero"):
        combine.weighted(x, make([0.0, 0.0]))
    for bad in (-1.0, NAN, math.inf):
        with pytest.raises(ValueError, match=rf"not negative, but weights\[1\] is {bad}"):
            combine.weighted(x, make([1.0, bad]))


def test_weights_of_another_shape_or_kind():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"weights of shape \(2,\), got shape \(2, 1\)"):
        combine.weighted(x, torch.ones(2, 1))
    with pytest.raises(TypeError, match=r"weights are real numbers, got torch\.complex64"):
        combine.weighted(x, torch.ones(2, dtype=torch.complex64))
