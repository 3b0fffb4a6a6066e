import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.estimators.rows import check_weights, hold_out, with_weight


@given(st.integers(1, 400), st.floats(0.01, 0.5), st.integers(0, 3), st.integers(1, 6))
def test_rows_are_split_and_small_parts_are_none(num_rows, fraction, seed, classes):
    keys = np.random.default_rng(seed).integers(classes, size=num_rows)
    for own in (keys, None):
        train, held_out = hold_out(num_rows, fraction, own, seed)
        assert sorted([*train, *held_out]) == list(range(num_rows))
        assert len(held_out) == 0 or 10 <= len(held_out) <= round(fraction * num_rows)
    train, held_out = hold_out(num_rows, fraction, keys, seed)
    assert set(keys) == set(keys[train])  # no class is held out as a whole


def test_classes_are_held_out_in_their_shares():
    keys = np.repeat([0, 1, 2], [600, 300, 100])
    _, held_out = hold_out(1000, 0.1, keys, seed=0)
    assert np.bincount(keys[held_out]).tolist() == [60, 30, 10]
    other = hold_out(1000, 0.1, keys, seed=1)[1]
    assert set(other) != set(held_out)


@pytest.mark.parametrize("seed", range(20))
def test_a_class_that_stands_once_trains(seed):
    keys = np.repeat([0, 1, 2], [50, 1, 49])
    train, held_out = hold_out(100, 0.5, keys, seed)
    assert 50 in train
    assert len(held_out) == 49


def test_numbers_are_held_out_from_low_to_high():
    keys = np.random.default_rng(0).normal(size=1000)
    _, held_out = hold_out(1000, 0.1, keys, seed=0)
    deciles = np.searchsorted(np.quantile(keys, np.linspace(0.1, 0.9, 9)), keys[held_out])
    assert np.bincount(deciles).tolist() == [10] * 10


def test_weights_are_checked():
    assert check_weights("fit", None, 3) is None
    assert check_weights("fit", 2, 3).tolist() == [2.0, 2.0, 2.0]
    for weights, text in {
        (1.0, 2.0): r"fit: sample_weight is one number for each of the 3 rows, so of shape \(3,\);"
        r" got shape \(2,\)",
        (1.0, -2.0, 0.0): r"fit: sample_weight is finite and not negative, but 1 of 3 aren't:"
        r" sample_weight\[1\] is -2.0",
        (1.0, np.nan, np.inf): r"but 2 of 3 aren't: sample_weight\[1\] is nan",
        (0.0, 0.0, 0.0): "fit: all 3 of sample_weight are zero: no row is left",
        ("a", "b", "c"): "fit: sample_weight holds something that is no number",
    }.items():
        with pytest.raises(ValueError, match=text):
            check_weights("fit", weights, 3)


def test_rows_of_weight_zero_are_left_out():
    x, y, weights = with_weight(np.eye(3), np.arange(3), np.array([1.0, 0.0, 2.0]))
    assert y.tolist() == [0, 2]
    assert weights.tolist() == [1.0, 2.0]
    assert x.tolist() == [[1, 0, 0], [0, 0, 1]]
