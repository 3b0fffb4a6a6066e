"""The job of `unisono train` as a whole, without the terminal."""

import json
import math

import pytest
import torch
from rich.console import Console

from unisono.commands.data import LOADERS
from unisono.commands.outcome import ArgumentError
from unisono.commands.run_folder import ENSEMBLE, PLAN, RUN, TEST_OUTPUTS, RunFolder
from unisono.commands.train import CURVES, METRICS, PICTURE, SWEEP, TrainRequest, run_train

KEYS = {
    "data",
    "model",
    "members",
    "epochs",
    "seed",
    "lr",
    "batch_size",
    "sampling",
    "patience",
    "validation_loss",
    "stopped",
    "best_epoch",
    "device",
    "torch",
    "train_images",
    "test_images",
    "classes",
    "accuracy",
    "nll",
    "train_loss",
    "divided_images",
    "most_divided",
}


def train(tmp_path, **changes):
    values = {"data": "digits", "members": 3, "epochs": 1, "batch_size": 256} | changes
    request = TrainRequest(**values, device="cpu", out=tmp_path)
    return run_train(request, Console(quiet=True))


def test_the_metrics_say_everything(tmp_path):
    metrics = train(tmp_path, epochs=2).metrics
    assert set(metrics) == KEYS
    for name in ("accuracy", "nll"):
        scores = metrics[name]
        assert set(scores) == {
            "members",
            "mean_member",
            "ensemble_mean_probability",
            "ensemble_vote",
        }
        assert len(scores["members"]) == 3
        assert scores["mean_member"] == pytest.approx(sum(scores["members"]) / 3)
    assert [len(losses) for losses in metrics["train_loss"]] == [3, 3]
    assert metrics["divided_images"] > 20
    assert len(metrics["most_divided"]) == 20
    for case in metrics["most_divided"]:
        assert sum(case["votes"]) == 3
    assert json.loads((tmp_path / METRICS).read_text()) == metrics
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")


def test_an_ensemble_beats_its_mean_member(tmp_path):
    scores = train(tmp_path, members=5, epochs=8, batch_size=64, lr=("3e-3",)).metrics
    assert scores["accuracy"]["ensemble_mean_probability"] > scores["accuracy"]["mean_member"] > 0.9
    # The mean of probabilities can't have a larger NLL than the mean member (Jensen).
    assert scores["nll"]["ensemble_mean_probability"] < scores["nll"]["mean_member"]


@pytest.mark.parametrize("model", ["torchless", pytest.param("cnn", marks=pytest.mark.slow)])
def test_other_models(tmp_path, monkeypatch, model):
    if model == "torchless":
        (tmp_path / "torchless.py").write_text(
            "from torch import nn\n"
            "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        model = "torchless:make"
    metrics = train(tmp_path, model=model, members=2).metrics
    assert metrics["model"] == model


def test_one_member_has_nobody_to_disagree_with(tmp_path):
    metrics = train(tmp_path, members=1).metrics
    assert (metrics["divided_images"], metrics["most_divided"]) == (0, [])
    scores = metrics["accuracy"]
    assert scores["members"] == [scores["mean_member"]] == [scores["ensemble_vote"]]


def test_a_training_that_explodes_is_still_valid_json(tmp_path):
    metrics = train(tmp_path, lr=("1e30",), epochs=2).metrics
    text = (tmp_path / METRICS).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == metrics
    # The members are as they were built: the epoch in which they exploded is undone.
    assert metrics["stopped"] == ["not finite"] * 3
    assert metrics["nll"]["mean_member"] == pytest.approx(math.log(10), abs=0.2)


def test_the_notes_name_who_stopped(tmp_path):
    values = {"data": "digits", "epochs": 12, "batch_size": 256, "patience": 1}
    rates = ("1e30", "1e-1", "1e-2", "3e-1")
    request = TrainRequest(**values, lr=rates, device="cpu", out=tmp_path)
    report = run_train(request, Console(quiet=True))
    assert report.notes[-1] == "1 of 4 members were frozen, their loss was not finite: 0"
    assert (
        report.notes[0].endswith("of 4 members stopped early: 1, 3")
        or "stopped early" in (report.notes[0])
    )
    assert report.metrics["lr"] == [1e30, 0.1, 0.01, 0.3]
    files = {file.name for file in report.files}
    assert files == {METRICS, PICTURE, CURVES, SWEEP, RUN, TEST_OUTPUTS, PLAN, ENSEMBLE}


def test_a_run_is_taken_up_where_it_stood(tmp_path):
    def run(folder, epochs, **options):
        values = {"data": "digits", "members": 3, "batch_size": 256, "device": "cpu"}
        request = TrainRequest(**values, epochs=epochs, out=tmp_path / folder, **options)
        return run_train(request, Console(quiet=True)).metrics

    whole = run("whole", 4)
    run("parts", 2, checkpoint_every=1)
    with pytest.raises(ArgumentError, match="is of an earlier run: add --resume, or name another"):
        run("parts", 4, checkpoint_every=1)
    assert run("parts", 4, resume=True) == whole
    with pytest.raises(ArgumentError, match=r"--resume: .*seed was 0 and is 1"):
        run("parts", 5, resume=True, seed=1)


def test_resume_without_a_checkpoint(tmp_path):
    with pytest.raises(ArgumentError, match=r"--resume: there is no .*; leave --resume out"):
        train(tmp_path, resume=True)


def test_the_run_keeps_what_every_member_says(tmp_path):
    metrics = train(tmp_path).metrics
    run = RunFolder(tmp_path)
    about = run.description
    assert (about.kind, about.task, about.data) == ("images", "classification", "digits")
    assert about.classes == tuple(range(10))
    assert run.metrics() == metrics
    found = run.test_outputs()
    assert found.outputs.shape == (3, metrics["test_images"], 10)
    assert found.rows.tolist() == list(range(metrics["test_images"]))
    right = (found.outputs.argmax(-1) == found.targets).double().mean(-1)
    assert right.tolist() == metrics["accuracy"]["members"]
    split = LOADERS["digits"]()
    torch.testing.assert_close(found.inputs / 255, split.test_images, atol=1 / 255, rtol=0)
    assert run.plan()["strategy"] == "fused"
    assert run.test_table() is None
