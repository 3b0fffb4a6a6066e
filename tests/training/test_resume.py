"""A training that was interrupted and taken up again is the training that was not."""

from __future__ import annotations

import copy
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from unisono import CheckpointError, Ensemble, EnsembleWarning, fit, optim
from unisono.checkpoint.reading import read
from unisono.training.plain import from_plain, to_plain

N = 3
SOURCE = Path(__file__).parents[2] / "src"


def net():
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


class Interrupted(Exception):
    pass


def make_data():
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
    return (x[:40], x[:40, :3].argmax(1)), (x[40:], x[40:, :3].argmax(1))


OPTIMIZERS = {
    "adam": lambda ens: optim.Adam(ens, lr=[0.3, 0.02, 0.01]),
    "sgd": lambda ens: optim.SGD(ens, lr=[3.0, 0.1, 0.03], momentum=0.9),
    "rmsprop": lambda ens: optim.RMSprop(ens, lr=0.01, centered=True),
    "adamw": lambda ens: optim.AdamW(ens, lr=0.02, weight_decay=[0.1, 0.2, 0.0]),
}
SCHEDULERS = {
    "none": (lambda o: [], "epoch"),
    "milestones": (lambda o: [torch.optim.lr_scheduler.MultiStepLR(o, [2, 5])], "epoch"),
    "one-cycle": (
        lambda o: [torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=100)],
        "step",
    ),
    "plateau": (
        lambda o: [torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.1)],
        "epoch",
    ),
}


def train(checkpoint, *, optimizer="adam", scheduler="none", stop_after=None, **options):
    """The whole training, or until it is interrupted after an epoch."""
    train_data, held = make_data()
    ens = Ensemble.build(net, N, strategy="fused")
    chosen = OPTIMIZERS[optimizer](ens)
    make, every = SCHEDULERS[scheduler]

    def interrupt(end):
        if end.epoch == stop_after:
            raise Interrupted

    values = {
        "loss": F.cross_entropy,
        "epochs": 8,
        "batch_size": 16,
        "sampling": "bootstrap",
        "validation": held,
        "metrics": {"accuracy": lambda y, t: (y.argmax(1) == t).float().mean()},
        "patience": 3,
        "checkpoint": checkpoint,
        "progress": False,
    } | options
    history = fit(
        ens,
        values.pop("train", train_data),
        optimizer=chosen,
        scheduler=make(chosen),
        scheduler_every=every,
        callbacks=[interrupt],
        **values,
    )
    return ens, chosen, history


def assert_same(first, second):
    """Weights, optimizer state and history, bit by bit."""
    for name, tensor in first[0].stacked_tensors().items():
        other = second[0].stacked_tensors()[name]
        assert torch.equal(tensor, other), name
        assert tensor.stride() == other.stride(), name
    mine, theirs = first[1].state_dict(), second[1].state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for key, values in mine["state"].items():
        for name, value in values.items():
            assert torch.equal(value, theirs["state"][key][name]), (key, name)
    ours, its = first[2].to_dict(), second[2].to_dict()
    for each in (ours, its):
        each.pop("seconds")
    assert ours == its


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("stop_after", [0, 3, 6])
def test_resumed_is_uninterrupted_bitwise(tmp_path, optimizer, scheduler, stop_after):
    how = {"optimizer": optimizer, "scheduler": scheduler}
    whole = train(tmp_path / "whole", **how)
    if whole[2].epochs <= stop_after:
        pytest.skip("all members have stopped before")
    file = tmp_path / "run"
    with pytest.raises(Interrupted):
        # The callback comes before the checkpoint: the file is of the epoch before.
        train(file, stop_after=stop_after, **how)
    assert file.exists() == (stop_after > 0)
    torch.manual_seed(99)
    assert_same(whole, train(file, resume=True, **how))


def test_a_finished_run_can_be_read_and_made_longer(tmp_path):
    file = tmp_path / "run"
    short = train(file, epochs=3, patience=None)
    again = train(file, epochs=3, patience=None, resume=True)
    assert_same(short, again)
    longer = train(file, epochs=5, patience=None, resume=True)
    assert_same(longer, train(tmp_path / "other", epochs=5, patience=None))


def test_a_frozen_member_stays_frozen(tmp_path):
    optimizer = dict(OPTIMIZERS)
    OPTIMIZERS["wild"] = lambda ens: optim.SGD(ens, lr=[1e30, 0.1, 0.03], momentum=0.9)
    try:
        with pytest.warns(EnsembleWarning, match="member 0"):
            whole = train(tmp_path / "whole", optimizer="wild", patience=None)
        with pytest.warns(EnsembleWarning, match="member 0"), pytest.raises(Interrupted):
            train(tmp_path / "run", optimizer="wild", patience=None, stop_after=4)
        resumed = train(tmp_path / "run", optimizer="wild", patience=None, resume=True)
        assert_same(whole, resumed)
        assert resumed[2].stopped == ("not finite", "", "")
    finally:
        OPTIMIZERS.clear()
        OPTIMIZERS.update(optimizer)


def test_every_k_epochs_and_the_last(tmp_path):
    file = tmp_path / "run"
    seen = []

    def look(end):
        seen.append(file.exists() and len(read(file, what="it")[0]["history.loss"]))

    ens = Ensemble.build(net, N, strategy="fused")
    data, _ = make_data()
    fit(
        ens,
        data,
        loss=F.cross_entropy,
        optimizer=optim.SGD(ens, lr=0.1),
        epochs=5,
        checkpoint=file,
        checkpoint_every=2,
        callbacks=[look],
        progress=False,
    )
    assert seen == [False, False, 2, 2, 4]
    assert len(read(file, what="it")[0]["history.loss"]) == 5
    assert os.listdir(tmp_path) == ["run"]


def test_the_generator_of_a_loader_goes_on(tmp_path):
    def loader():
        return DataLoader(
            TensorDataset(*make_data()[0]),
            batch_size=16,
            shuffle=True,
            generator=torch.Generator().manual_seed(5),
        )

    how = {"sampling": "shared", "batch_size": None}
    whole = train(tmp_path / "whole", train=loader(), **how)
    with pytest.raises(Interrupted):
        train(tmp_path / "run", train=loader(), stop_after=2, **how)
    assert_same(whole, train(tmp_path / "run", train=loader(), resume=True, **how))


def test_measured_plans_are_part_of_the_checkpoint(tmp_path, monkeypatch):
    from unisono import plans
    from unisono.engine.planning import measuring

    def run(**options):
        ens = Ensemble.build(net, N)
        data, _ = make_data()
        fit(
            ens,
            data,
            loss=F.cross_entropy,
            optimizer=optim.SGD(ens, lr=0.1),
            checkpoint=tmp_path / "run",
            progress=False,
            **options,
        )

    run(epochs=1)
    plans.clear()
    monkeypatch.setattr(measuring, "measure", None)  # whoever measures fails
    run(epochs=2, resume=True)


# Killed -------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_resume import train
ens, optimizer, history = train(sys.argv[2], resume=True, epochs=int(sys.argv[4]), patience=None)
torch.save({n: t.detach().clone() for n, t in ens.stacked_tensors().items()}, sys.argv[3])
"""


def start(tmp_path, file, epochs):
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            SCRIPT,
            str(Path(__file__).parent),
            str(file),
            str(tmp_path / "result"),
            str(epochs),
        ],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )


def kill_and_resume(tmp_path, kills, epochs):
    torch.set_num_threads(1)
    whole = train(tmp_path / "whole", epochs=epochs, patience=None)
    file = tmp_path / "run"
    dice = random.Random(0)
    killed = 0
    while killed < kills:
        process = start(tmp_path, file, epochs)
        before = file.stat().st_mtime_ns if file.exists() else 0
        while process.poll() is None and (not file.exists() or file.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(dice.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.stderr.close()
        assert process.wait() == -signal.SIGKILL, "it was done before it was hit: more epochs"
        killed += 1
        read(file, what="a checkpoint")  # whole, whenever it was
    process = start(tmp_path, file, epochs)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err.decode()
    result = torch.load(tmp_path / "result")
    for name, tensor in whole[0].stacked_tensors().items():
        assert torch.equal(tensor.detach(), result[name]), name
    return killed


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("_threads")
def test_killed_twice_and_resumed(tmp_path):
    assert kill_and_resume(tmp_path, 2, epochs=60) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("_threads")
def test_killed_twenty_times_and_resumed(tmp_path):
    assert kill_and_resume(tmp_path, 20, epochs=600) == 20


# Refusals -----------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_not_written_over(tmp_path):
    file = tmp_path / "run"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="is there already; pass resume=True to go on"):
        train(file)
    assert file.read_text() == "mine"


def test_folders(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; name a file in it"):
        train(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        train(tmp_path / "no" / "run")


@pytest.mark.parametrize("content", [b"", b"mine", b"\x10\0\0\0\0\0\0\0" + b"{}" * 8])
def test_another_file_is_refused_and_left(tmp_path, content):
    file = tmp_path / "run"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run isn't a checkpoint of unisono\.fit"):
        train(file, resume=True)
    assert file.read_bytes() == content


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path):
    file = tmp_path / "run"
    torch.save(Bomb(tmp_path / "executed"), file)
    with pytest.raises(CheckpointError, match=r"run isn't a checkpoint of unisono\.fit"):
        train(file, resume=True)
    assert not (tmp_path / "executed").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "executed").exists(), "the bomb is no bomb"


def test_a_truncated_file(tmp_path):
    file = tmp_path / "run"
    train(file, epochs=1)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"isn't a checkpoint of unisono\.fit"):
        train(file, resume=True)


def test_other_settings_are_listed_all_at_once_and_nothing_is_changed(tmp_path):
    file = tmp_path / "run"
    train(file, epochs=1)
    data, held = make_data()
    ens = Ensemble.build(lambda: nn.Linear(6, 3), N + 1)
    before = copy.deepcopy(ens.state_dict())
    optimizer = optim.SGD(ens, lr=0.1)
    with pytest.raises(CheckpointError, match="is a checkpoint of another training") as caught:
        fit(
            ens,
            data,
            loss=F.cross_entropy,
            optimizer=optimizer,
            epochs=2,
            batch_size=8,
            validation=held,
            checkpoint=file,
            resume=True,
            progress=False,
            seed=4,
            max_grad_norm=[1.0, 2.0, 3.0, 4.0],
            scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1),
        )
    text = str(caught.value)
    for line in (
        "batch_size was 16 and is 8",
        "max_grad_norm was None and is [1.0, 2.0, 3.0, 4.0]",
        "members was 3 and is 4",
        "optimizer was 'Adam' and is 'SGD'",
        "patience was 3 and is None",
        "sampling was 'Bootstrap()' and is 'Shared()'",
        "seed was 0 and is 4",
        "there were 0 schedulers and are 1",
    ):
        assert line in text
    assert text.endswith("Go on with the same settings, or start anew with another checkpoint=")
    for name, tensor in ens.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_full_disk_leaves_the_file_of_the_epoch_before(tmp_path, monkeypatch):
    file = tmp_path / "run"
    train(file, epochs=1, patience=None)
    content = file.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unisono.files._sync", full)
    with pytest.raises(OSError, match="No space left"):
        train(file, epochs=2, patience=None, resume=True)
    assert file.read_bytes() == content
    assert os.listdir(tmp_path) == ["run"]


def test_state_in_plain_attributes_is_named(tmp_path):
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)
            self.last = None

        def forward(self, x):
            self.last = self.linear.weight.detach().mean()
            return self.linear(x)

    ens = Ensemble.build(Remembers, N, strategy="fused")
    data, _ = make_data()
    with pytest.warns(EnsembleWarning, match=r"keeps in plain attributes \(`last`\)"):
        fit(
            ens,
            data,
            loss=F.cross_entropy,
            optimizer=optim.SGD(ens, lr=0.1),
            epochs=2,
            checkpoint=tmp_path / "run",
            progress=False,
        )


# The file -----------------------------------------------------------------------------------------


def test_plain_values_come_back_as_they_were():
    scheduler = torch.optim.lr_scheduler.MultiStepLR(
        torch.optim.SGD([torch.zeros(1)], lr=0.1), [3, 3, 7]
    )
    value = {
        **scheduler.state_dict(),
        "betas": (0.9, 0.1 + 0.2),
        "best": float("inf"),
        "numpy": np.float64(0.1),
        "tensor": torch.tensor(0.5),
        "nested": {1: [{"a": None}]},
    }
    back = from_plain(to_plain(value, "state"))
    assert back == value
    assert type(back["milestones"]) is type(value["milestones"])
    assert type(back["betas"]) is tuple


def test_what_json_cannot_hold_is_named():
    with pytest.raises(
        TypeError, match=r"fit: state\['f'\]\[0\] is a function, which a checkpoint"
    ):
        to_plain({"f": [lambda: 0]}, "state")
