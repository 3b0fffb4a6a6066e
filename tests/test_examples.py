"""The examples do what they say: every way to train gives the same weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import own_loop
import successive_halving
from unisono import fit, optim

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.fixture
def data():
    x, y = own_loop.load()
    return x[:300], y[:300]


def by_fit(train):
    ens = own_loop.build()
    fit(
        ens,
        train,
        loss=F.cross_entropy,
        optimizer=optim.Adam(ens, lr=own_loop.RATES),
        epochs=own_loop.EPOCHS,
        progress=False,
    )
    return ens


def assert_same(one, other):
    tensors = other.state_dict()
    assert one.state_dict().keys() == tensors.keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def assert_trained(ens):
    fresh = own_loop.build().state_dict()
    assert not any(torch.equal(t, fresh[name]) for name, t in ens.state_dict().items())


def test_the_loop_and_fit(data):
    one, other = own_loop.train_by_loop(*data), own_loop.train_by_fit(*data)
    assert_same(one, other)
    assert_trained(one)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lightning_and_fit(data, tmp_path, monkeypatch):
    from lightning_module import train_by_lightning

    monkeypatch.chdir(tmp_path)
    loader = DataLoader(TensorDataset(*data), own_loop.BATCH_SIZE)
    ens = train_by_lightning(loader)
    assert_same(ens, by_fit(loader))
    assert_trained(ens)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_accelerate_and_fit(data):
    from accelerate_loop import train_by_accelerate

    loader = DataLoader(TensorDataset(*data), own_loop.BATCH_SIZE)
    ens = train_by_accelerate(loader)
    assert_same(ens, by_fit(loader))
    assert_trained(ens)


def test_halving_really_shrinks_and_finds_the_best_rate():
    torch.manual_seed(0)
    centers = torch.randn(10, 784)
    y = torch.arange(200) % 10
    x = centers[y] + 0.5 * torch.randn(200, 784)
    rates = [1e-8, 1e-7, 1e-2, 1e-6]
    rounds = successive_halving.successive_halving(
        (x[:160], y[:160]), (x[160:], y[160:]), rates, epochs_per_round=1
    )
    assert [found.members for found in rounds] == [4, 2, 1]
    assert rounds[-1].best_rate == 1e-2
    assert rounds[-1].accuracy > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.py")))
def test_scripts_run_as_their_first_lines_say(script, tmp_path):
    if script == "ray_data.py":
        pytest.importorskip("ray", reason="needs unisono[ray]")
    done = subprocess.run(
        [sys.executable, str(FOLDER / script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "different" not in done.stdout
    assert done.stdout.strip()
