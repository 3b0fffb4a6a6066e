import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.estimators.moments import merge, moments

numbers = st.integers(-5, 5)


@st.composite
def weighted_rows(draw, min_size=1):
    rows = draw(st.lists(st.tuples(numbers, numbers), min_size=min_size, max_size=8))
    weights = draw(st.lists(st.integers(1, 3), min_size=len(rows), max_size=len(rows)))
    return np.array(rows, dtype=np.float64), np.array(weights)


@given(weighted_rows())
def test_a_weight_is_a_number_of_copies(given_rows):
    x, weights = given_rows
    found, copies = moments(x, weights), np.repeat(x, weights, axis=0)
    np.testing.assert_allclose(found.mean, copies.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.std, copies.std(0), atol=1e-12)
    assert found.weight == len(copies)


@given(weighted_rows(), weighted_rows())
def test_merged_moments_are_those_of_all_rows(one, other):
    found = merge(merge(None, moments(*one)), moments(*other))
    whole = moments(np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]]))
    np.testing.assert_allclose(found.mean, whole.mean, atol=1e-12)
    np.testing.assert_allclose(found.std, whole.std, atol=1e-12)
    assert found.weight == whole.weight


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 + 0.1, 1e300])
def test_a_constant_column_is_divided_by_one(value):
    assert moments(np.full((7, 1), value)).scale() == 1.0


def test_a_column_of_large_or_close_numbers_keeps_its_scale():
    np.testing.assert_allclose(moments(np.array([[1e200], [-1e200]])).scale(), 1e200)
    np.testing.assert_allclose(moments(np.array([[1e9], [1e9 + 2]])).scale(), 1.0)
