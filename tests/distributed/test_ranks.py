"""Members over real processes: started once for many checks, each of which is a test."""

from __future__ import annotations

import pytest

import checks_four
import checks_two
from launch import assert_passed, run_checks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run_checks("checks_two", 1, 2, tmp_path_factory)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run_checks("checks_four", 2, 4, tmp_path_factory)


@pytest.mark.parametrize("name", [check.__name__ for check in checks_two.CHECKS])
def test_two_blocks(two_ranks, name):
    assert_passed(two_ranks, name)


@pytest.mark.parametrize("name", [check.__name__ for check in checks_four.CHECKS])
def test_two_blocks_of_two_replicas(four_ranks, name):
    assert_passed(four_ranks, name)
