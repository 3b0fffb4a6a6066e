"""The job of `unisono train` as a whole, without the terminal."""

import json

import pytest
from rich.console import Console

from unisono.commands.train import METRICS, PICTURE, TrainRequest, run_train

KEYS = {
    "data",
    "model",
    "members",
    "epochs",
    "seed",
    "lr",
    "batch_size",
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
    scores = train(tmp_path, members=5, epochs=8, batch_size=64, lr=3e-3).metrics
    assert scores["accuracy"]["ensemble_mean_probability"] > scores["accuracy"]["mean_member"] > 0.9
    # The mean of probabilities can't have a larger NLL than the mean member (Jensen).
    assert scores["nll"]["ensemble_mean_probability"] < scores["nll"]["mean_member"]


@pytest.mark.parametrize("model", ["cnn", "torchless"])
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
    metrics = train(tmp_path, lr=1e30, epochs=2).metrics
    text = (tmp_path / METRICS).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == metrics
    assert metrics["nll"]["mean_member"] is None
