"""The two architectures and the contract of a factory."""

import re
import sys

import numpy as np
import pytest
import torch

from unisono.commands.data import split_images
from unisono.commands.models import SimpleCNN, SimpleMLP, choose_factory
from unisono.commands.outcome import ArgumentError

NETS = """
from torch import nn

def good():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

class Holder:
    make = staticmethod(good)

def needs(width):
    return nn.Linear(width, 10)

def fails():
    raise ValueError("no weights\\nsecond line")

def text():
    return "a model"

def too_few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def too_large():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

class Pair(nn.Module):
    def forward(self, x):
        return x, x

number = 5
"""


@pytest.fixture
def split():
    return split_images(np.random.rand(50, 8, 8), np.arange(50) % 10)


@pytest.fixture(autouse=True)
def _nets(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    (tmp_path / "their_nets.py").write_text(NETS)
    (tmp_path / "their_broken.py").write_text("1 / 0")
    (tmp_path / "their_script.py").write_text("import sys; sys.exit('usage: ...')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("their_nets", "their_broken", "their_script"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_the_mlp_is_the_tutorials():
    shapes = {name: tuple(p.shape) for name, p in SimpleMLP().named_parameters()}
    assert shapes == {
        "fc1.weight": (128, 784),
        "fc1.bias": (128,),
        "fc2.weight": (128, 128),
        "fc2.bias": (128,),
        "fc3.weight": (10, 128),
        "fc3.bias": (10,),
    }


@pytest.mark.parametrize("side", [8, 28])
def test_both_models_fit_both_data(side):
    split = split_images(np.random.rand(50, side, side), np.arange(50) % 10)
    for spec, kind in (("mlp", SimpleMLP), ("cnn", SimpleCNN)):
        model = choose_factory(spec, split)()
        assert isinstance(model, kind)
        assert model(split.train_images).shape == (len(split.train_images), 10)


@pytest.mark.parametrize("spec", ["their_nets:good", "their_nets:Holder.make"])
def test_a_factory_in_the_current_folder(split, spec):
    logits = choose_factory(spec, split)()(split.test_images)
    assert logits.shape == (len(split.test_images), 10)


WRONG = [
    ("resnet", "unknown model 'resnet'; choose mlp or cnn or package.module:factory"),
    ("their_nets:", "--model their_nets:: expected package.module:factory"),
    (":good", "--model :good: expected package.module:factory"),
    ("their_nets:bad", "--model their_nets:bad: 'their_nets' has no 'bad'"),
    ("their_nets:Holder.x", "--model their_nets:Holder.x: 'their_nets' has no 'Holder.x'"),
    (
        "their_nets:number",
        "--model their_nets:number: expected a function or class, found int",
    ),
    (
        "their_broken:make",
        (
            "--model their_broken:make: can't import 'their_broken': "
            "ZeroDivisionError: division by zero"
        ),
    ),
    (
        "their_script:make",
        "--model their_script:make: can't import 'their_script': SystemExit: usage: ...",
    ),
    (
        ".their_nets:good",
        (
            "--model .their_nets:good: can't import '.their_nets': TypeError: the 'package' "
            "argument is required to perform a relative import for '.their_nets'"
        ),
    ),
    (
        "their_nets:needs",
        (
            "--model their_nets:needs: their_nets:needs() failed: TypeError: needs() missing 1 "
            "required positional argument: 'width'"
        ),
    ),
    (
        "their_nets:fails",
        "--model their_nets:fails: their_nets:fails() failed: ValueError: no weights",
    ),
    (
        "their_nets:text",
        "--model their_nets:text: expected a torch.nn.Module from their_nets:text(), got str",
    ),
    (
        "their_nets:too_few",
        "--model their_nets:too_few: expected logits of shape (2, 10) for 2 images, got (2, 3)",
    ),
    (
        "their_nets:Pair",
        "--model their_nets:Pair: expected logits of shape (2, 10) for 2 images, got tuple",
    ),
]


@pytest.mark.parametrize(("spec", "message"), WRONG, ids=[spec for spec, _ in WRONG])
def test_a_wrong_model_is_named_with_its_fault(split, spec, message):
    with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
        choose_factory(spec, split)


def test_a_model_that_does_not_take_the_images(split):
    start = (
        r"^--model their_nets:too_large: the model fails on images of shape \(2, 1, 8, 8\): "
        "RuntimeError: "
    )
    with pytest.raises(ArgumentError, match=start):
        choose_factory("their_nets:too_large", split)


def test_checking_a_model_leaves_its_training_mode_to_the_next_one(split):
    make = choose_factory("their_nets:good", split)
    assert make().training


def test_the_images_reach_a_factory_model_unchanged(split):
    before = split.train_images.clone()
    choose_factory("their_nets:good", split)
    assert torch.equal(split.train_images, before)
