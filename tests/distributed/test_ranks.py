"""Members over real processes: started once for many checks, each of which is a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import checks_four
import checks_two
from launch import run_ranks

pytestmark = pytest.mark.distributed


def _results(module: str, data: int, ranks: int, tmp_path_factory: Any) -> list[dict[str, str]]:
    folder: Path = tmp_path_factory.mktemp(module)
    return run_ranks("worker", module, str(data), ranks=ranks, folder=folder)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return _results("checks_two", 1, 2, tmp_path_factory)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return _results("checks_four", 2, 4, tmp_path_factory)


@pytest.mark.parametrize("name", [check.__name__ for check in checks_two.CHECKS])
def test_two_blocks(two_ranks, name):
    _assert_passed(two_ranks, name)


@pytest.mark.parametrize("name", [check.__name__ for check in checks_four.CHECKS])
def test_two_blocks_of_two_replicas(four_ranks, name):
    _assert_passed(four_ranks, name)


def _assert_passed(results, name):
    for rank, found in enumerate(results):
        text = found.get(name, "not run: a check before it failed")
        assert not text, f"rank {rank}:\n{text}"
