"""`fit` over real processes: started once for many checks, each of which is a test."""

from __future__ import annotations

import checks_ahead
import checks_fit
import checks_fit_four
import pytest

from launch import assert_passed, run_checks
from unisono.training.shares import spread_evenly

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_checks("checks_fit", 1, 2, tmp_path_factory)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run_checks("checks_fit_four", 2, 4, tmp_path_factory)


@pytest.mark.parametrize("name", [check.__name__ for check in checks_fit.CHECKS])
def test_two_blocks(two_ranks, name):
    assert_passed(two_ranks, name)


@pytest.fixture(scope="module")
def two_ranks_ahead(tmp_path_factory):
    return run_checks("checks_ahead", 1, 2, tmp_path_factory)


@pytest.mark.parametrize("name", [check.__name__ for check in checks_ahead.CHECKS])
def test_two_blocks_one_of_them_ahead(two_ranks_ahead, name):
    assert_passed(two_ranks_ahead, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in checks_fit_four.CHECKS])
def test_two_blocks_of_two_replicas(four_ranks, name):
    assert_passed(four_ranks, name)


@pytest.mark.parametrize(
    ("held", "members", "wanted"),
    [
        ([[0, 1], [2, 3]], [0, 1, 2, 3], [[0, 1], [2, 3]]),
        ([[0, 1, 2], [3, 4]], [0, 1, 3], [[0, 1, 2], [3, 4]]),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], [1, 2, 3], [[0, 1, 2], [3, 4, 5, 6, 7]]),
        ([[0, 1, 2], [3, 4, 5], [6, 7]], [0, 1, 2], [[0], [1, 3, 4, 5], [2, 6, 7]]),
        ([[0, 1], [2, 3], [4, 5]], [2, 3], [[0, 1, 3], [2], [4, 5]]),
        ([[0], [1], [2]], [1], [[0], [1], [2]]),
    ],
)
def test_members_move_only_where_the_largest_share_shrinks(held, members, wanted):
    assert spread_evenly(held, members) == wanted
