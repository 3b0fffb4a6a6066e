"""Shards of an ensemble over real processes."""

from __future__ import annotations

import checks_checkpoint
import pytest
import torch
from torch import nn

from launch import assert_passed, run_checks
from unisono import Ensemble, distributed, optim

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory):
    return run_checks("checks_checkpoint", 2, 4, tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("name", [check.__name__ for check in checks_checkpoint.CHECKS])
def test_four_ranks(four_ranks, name):
    assert_passed(four_ranks, name)


def test_a_process_alone_saves_and_loads(tmp_path):
    ens = Ensemble.build(lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), 4)
    optimizer = optim.Adam(ens, lr=[0.1, 0.2, 0.3, 0.4])
    ens(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    distributed.save(ens, tmp_path / "deep" / "folder", optimizer)
    make_model = lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))  # noqa: E731
    found = distributed.load(tmp_path / "deep" / "folder", make_model)
    other = optim.Adam(found, lr=[1.0] * 4)
    distributed.load_optimizer(tmp_path / "deep" / "folder", found, other)
    torch.testing.assert_close(dict(found.state_dict()), dict(ens.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"distributed\.async_save: .* call distributed\.save"):
        distributed.async_save(ens, tmp_path / "folder")
