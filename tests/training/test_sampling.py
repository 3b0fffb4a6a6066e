"""Which rows each member sees: what each kind promises, and what its stream depends on."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.training import sampling
from unisono.training.kinds import Bootstrap, Folds, Shared, Shuffled, Subset
from unisono.training.streams import Purpose

KINDS = {
    "shared": sampling.shared(),
    "shuffled": sampling.shuffled(),
    "bootstrap": sampling.bootstrap(),
    "folds": sampling.folds(),
    "folds-3": sampling.folds(3),
    "subset": sampling.subset(0.6),
}
INDEPENDENT = {name: kind for name, kind in KINDS.items() if name != "folds"}  # k is N there
OWN = {name: kind for name, kind in KINDS.items() if name != "shared"}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_own = pytest.mark.parametrize("kind", OWN.values(), ids=OWN)
every_independent = pytest.mark.parametrize("kind", INDEPENDENT.values(), ids=INDEPENDENT)


def rng(seed, purpose, member=0, epoch=0):
    """The documented stream, written out."""
    sequence = np.random.SeedSequence(seed, spawn_key=(purpose, member, epoch))
    return np.random.default_rng(sequence)


def slow_rows(kind, n, member, seed, num_members):
    """The rows of one member by the words of the docs, in the order that numpy gives them."""
    if isinstance(kind, Bootstrap):
        return rng(seed, 0, member).integers(n, size=n)
    if isinstance(kind, Subset):
        size = max(1, round(kind.fraction * n))
        return rng(seed, 0, member).choice(n, size, replace=False, shuffle=False)
    if isinstance(kind, Folds):
        k = num_members if kind.k is None else kind.k
        hidden = rng(seed, 3).permutation(n)[member % k :: k]
        return np.array([row for row in range(n) if row not in hidden], dtype=np.int64)
    return np.arange(n)


def slow_order(kind, n, member, epoch, seed, num_members):
    if isinstance(kind, Shared):
        return rng(seed, 2, 0, epoch).permutation(n)
    rows = slow_rows(kind, n, member, seed, num_members)
    rng(seed, 1, member, epoch).shuffle(rows)
    if isinstance(kind, Folds):
        k = num_members if kind.k is None else kind.k
        return rows[: n - math.ceil(n / k)]
    return rows


def order(kind, members, epoch=0, *, n=30, seed=0, num_members=8):
    return kind.order(n, members, epoch, seed=seed, num_members=num_members)


# The oracle ---------------------------------------------------------------------------------------


@every_kind
@given(
    n=st.integers(1, 40),
    num_members=st.integers(2, 7),
    epoch=st.integers(0, 5),
    seed=st.integers(0, 2**70),
    data=st.data(),
)
def test_orders_and_rows_equal_the_documented_streams(kind, n, num_members, epoch, seed, data):
    n = max(n, num_members, 3)  # a row for each fold
    members = data.draw(st.lists(st.integers(0, num_members - 1), min_size=1, unique=True))
    found = kind.order(n, members, epoch, seed=seed, num_members=num_members)
    assert found.dtype == np.int64
    assert found.shape == (len(members), kind.rows_per_epoch(n, num_members=num_members))
    for own, member in zip(found, members, strict=True):
        np.testing.assert_array_equal(own, slow_order(kind, n, member, epoch, seed, num_members))
        rows = kind.rows(n, member, seed=seed, num_members=num_members)
        np.testing.assert_array_equal(rows, slow_rows(kind, n, member, seed, num_members))
        held_out = kind.held_out(n, member, seed=seed, num_members=num_members)
        assert held_out.tolist() == sorted(set(range(n)) - set(rows.tolist()))
        assert not Counter(own.tolist()) - Counter(rows.tolist())  # no row more often than drawn


def test_purposes_keep_their_numbers():
    # They are part of what a seed means: a resumed run of an older version goes on as before.
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "ROWS": 0,
        "ORDER": 1,
        "COMMON_ORDER": 2,
        "FOLDS": 3,
        "WORKERS": 4,
    }


# Independence -------------------------------------------------------------------------------------


@every_independent
def test_a_member_sees_the_same_whatever_the_size_of_the_ensemble(kind):
    small = order(kind, range(5), 2, num_members=5)
    large = order(kind, range(50), 2, num_members=50)
    np.testing.assert_array_equal(large[:5], small)
    for i in range(5):
        of_small = kind.held_out(30, i, seed=0, num_members=5)
        np.testing.assert_array_equal(kind.held_out(30, i, seed=0, num_members=50), of_small)


@every_kind
def test_a_member_sees_the_same_whoever_else_trains(kind):
    everyone = order(kind, range(8), 1)
    np.testing.assert_array_equal(order(kind, [6, 1], 1), everyone[[6, 1]])
    for members in ([0], [0, 3]):
        np.testing.assert_array_equal(order(kind, np.array(members), 1), everyone[members])


@every_kind
def test_methods_leave_no_trace(kind):
    state = np.random.get_state()[1].copy()
    first = order(kind, range(8), 4)
    order(kind, range(8), 3)
    kind.rows(30, 2, seed=0, num_members=8)
    np.testing.assert_array_equal(order(kind, range(8), 4), first)
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@every_kind
def test_epochs_and_seeds_differ(kind):
    assert (order(kind, [0], 0) != order(kind, [0], 1)).any()
    assert (order(kind, [0], 0, seed=0) != order(kind, [0], 0, seed=1)).any()


@every_own
def test_members_differ(kind):
    orders = order(kind, range(8)).tolist()
    assert len({tuple(own) for own in orders}) == 8


@every_own
@pytest.mark.parametrize("seeds", [(5, 5 + 2**32), (0, 2**32)])
def test_long_seeds_are_not_cut(kind, seeds):
    one, other = (order(kind, [1, 2], seed=seed) for seed in seeds)
    assert (one != other).any()


# What each kind is for ----------------------------------------------------------------------------


@pytest.mark.parametrize("epoch", [0, 1])
def test_shared_gives_all_members_one_order(epoch):
    orders = order(sampling.shared(), [0, 4, 7], epoch)
    assert sorted(orders[0].tolist()) == list(range(30))
    assert (orders == orders[0]).all()


def test_shuffled_sees_every_row_once_in_each_epoch():
    for epoch in range(3):
        for own in order(sampling.shuffled(), range(8), epoch).tolist():
            assert sorted(own) == list(range(30))
    assert sampling.shuffled().held_out(30, 0, seed=0, num_members=8).tolist() == []


def test_bootstrap_keeps_its_resample_and_leaves_the_expected_share_out():
    kind, n, members = sampling.bootstrap(), 50, 400
    resamples = [sorted(kind.rows(n, i, seed=0, num_members=members)) for i in range(members)]
    for epoch in range(2):
        assert np.sort(kind.order(n, range(members), epoch, seed=0, num_members=members)).tolist() \
            == [list(map(int, rows)) for rows in resamples]  # fmt: skip
    shares = [len(kind.held_out(n, i, seed=0, num_members=members)) / n for i in range(members)]
    # The share of one member has a standard deviation of about 0.044: 5 standard errors of 400.
    assert abs(np.mean(shares) - (1 - 1 / n) ** n) < 5 * 0.044 / math.sqrt(members)
    drawn = Counter(int(row) for rows in resamples for row in rows)
    # Each row is drawn Binomial(n * members, 1 / n) times.
    assert all(abs(drawn[row] - members) < 5 * math.sqrt(members) for row in range(n))


@given(n=st.integers(2, 40), data=st.data())
def test_folds_are_a_partition(n, data):
    k = data.draw(st.integers(2, n))
    kind = sampling.folds(k)
    held_out = [kind.held_out(n, i, seed=1, num_members=k) for i in range(k)]
    assert sorted(row for rows in held_out for row in rows.tolist()) == list(range(n))
    sizes = {len(rows) for rows in held_out}
    assert max(sizes) - min(sizes) <= 1
    np.testing.assert_array_equal(kind.held_out(n, 1, seed=1, num_members=k + 2), held_out[1])
    np.testing.assert_array_equal(kind.held_out(n, k, seed=1, num_members=k + 2), held_out[0])
    if k < n:
        orders = kind.order(n, range(k), 0, seed=1, num_members=k)
        for own, hidden in zip(orders.tolist(), held_out, strict=True):
            assert len(set(own)) == len(own) == n - max(sizes)
            assert not set(own) & set(hidden.tolist())


def test_folds_default_to_one_per_member():
    by_default = order(sampling.folds(), range(5), num_members=5)
    np.testing.assert_array_equal(by_default, order(sampling.folds(5), range(5), num_members=5))
    assert sampling.as_sampling("folds").rows_per_epoch(10, num_members=5) == 8


def test_a_member_with_a_small_fold_leaves_out_another_row_each_epoch():
    kind = sampling.folds(3)  # of 10 rows: 4, 3 and 3
    trained_on = [set(order(kind, [2], epoch, n=10)[0].tolist()) for epoch in range(20)]
    assert all(len(rows) == 6 for rows in trained_on)
    assert set.union(*trained_on) == set(kind.rows(10, 2, seed=0, num_members=8).tolist())


def test_folds_are_random():
    kind = sampling.folds(2)
    halves = {tuple(kind.held_out(12, 0, seed=seed, num_members=2)) for seed in range(5)}
    assert len(halves) == 5


@pytest.mark.parametrize(
    ("fraction", "rows"), [(1.0, 100), (1, 100), (0.29, 29), (0.5, 50), (0.001, 1), (0.006, 1)]
)
def test_subset_has_that_part_of_the_rows_once(fraction, rows):
    kind = sampling.subset(fraction)
    found = kind.rows(100, 3, seed=0, num_members=4).tolist()
    assert len(set(found)) == len(found) == rows
    assert len(kind.held_out(100, 3, seed=0, num_members=4)) == 100 - rows
    for epoch in range(2):
        assert sorted(order(kind, [3], epoch, n=100)[0].tolist()) == sorted(found)


def test_subsets_draw_each_row_equally_often():
    n, members, kind = 40, 400, sampling.subset(0.25)
    rows = [kind.rows(n, i, seed=0, num_members=members) for i in range(members)]
    drawn = np.bincount(np.concatenate(rows), minlength=n)
    # Each row is drawn Binomial(members, 1/4) times: 100 with a standard deviation of 8.7.
    assert (np.abs(drawn - members / 4) < 5 * math.sqrt(members * 3 / 16)).all()


# Names and messages -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared", "shuffled", "bootstrap", "folds"])
def test_names_stand_for_the_functions(name):
    kind = getattr(sampling, name)()
    assert sampling.as_sampling(name) == kind
    assert sampling.as_sampling(kind) is kind


def test_kinds_are_values():
    assert sampling.folds(3) == Folds(3) != sampling.folds(4)
    assert sampling.shuffled() == Shuffled() != sampling.shared()
    assert len({sampling.subset(0.5), sampling.subset(0.5)}) == 1
    assert str(sampling.subset(0.5)) == "sampling.subset(fraction=0.5)"


ALLOWED = r'"shared", "shuffled", "bootstrap", "folds", or sampling\.subset\(fraction\)'


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("bagging", ValueError, rf"^sampling is one of {ALLOWED}; got 'bagging'$"),
        (3, TypeError, rf"^sampling is one of {ALLOWED}; got 3$"),
        (None, TypeError, rf"^sampling is one of {ALLOWED}; got None$"),
        (
            sampling.bootstrap,
            TypeError,
            r"; got the function bootstrap; call it: sampling\.bootstrap\(\.\.\.\)$",
        ),
        (
            "subset",
            ValueError,
            (
                r'^sampling: "subset" alone doesn\'t say how large; give a part of the rows: '
                r"sampling\.subset\(0\.5\)$"
            ),
        ),
    ],
)
def test_what_is_no_sampling(value, error, message):
    with pytest.raises(error, match=message):
        sampling.as_sampling(value)


@pytest.mark.parametrize("k", [1, 0, -3, 2.0, "5", True])
def test_number_of_folds(k):
    message = r"^sampling\.folds: k is the number of folds, at least 2, or None for one per member;"
    with pytest.raises(ValueError, match=rf"{message} got {k!r}$"):
        sampling.folds(k)


@pytest.mark.parametrize("fraction", [0, 0.0, -0.1, 1.01, float("nan"), "half", True, None])
def test_fraction_of_a_subset(fraction):
    message = r"^sampling\.subset: fraction is a part of the rows, above 0 and at most 1; got "
    with pytest.raises(ValueError, match=message):
        sampling.subset(fraction)


@pytest.mark.parametrize(
    ("kind", "n", "num_members", "message"),
    [
        (
            sampling.folds(),
            9,
            1,
            (
                r"^sampling\.folds: one fold per member takes at least 2 members, got 1; give the "
                r"number of folds: sampling\.folds\(5\)$"
            ),
        ),
        (
            sampling.folds(),
            9,
            10,
            (
                r"^sampling\.folds: each fold has at least one row, but 9 rows were to be split "
                r"into 10 folds; give a smaller number of them: sampling\.folds\(k\)$"
            ),
        ),
        (sampling.folds(7), 6, 2, r"but 6 rows were to be split into 7 folds"),
    ],
)
def test_folds_that_cannot_be_made(kind, n, num_members, message):
    for call in (
        lambda: kind.check(n, num_members=num_members),
        lambda: kind.rows(n, 0, seed=0, num_members=num_members),
        lambda: kind.order(n, [0], 0, seed=0, num_members=num_members),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@every_kind
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, r"^sampling: members train on rows .* got 0 rows and 8 members$"),
        ({"num_members": 0}, r"^sampling: members train on .* got 30 rows and 0 members$"),
        ({"members": []}, r"^sampling: there is no member to give rows to$"),
        ({"members": [2, 8, -1]}, r"^sampling: members are 0 to 7; got \[8, -1\]$"),
        ({"seed": -1}, r"^sampling: epoch and seed aren't negative; got epoch=0, seed=-1$"),
        ({"epoch": -2}, r"^sampling: epoch and seed aren't negative; got epoch=-2, seed=0$"),
    ],
)
def test_arguments_of_order(kind, change, message):
    with pytest.raises(ValueError, match=message):
        order(kind, **{"members": [0], **change})
