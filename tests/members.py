"""Models to compare, and what is expected of a comparison."""

import copy
from collections import OrderedDict

import torch
from torch import nn

from unisono.differences import check_members, compare_members


class ListWithName(list):
    name = None


class Holder(nn.Module):
    """A layer, and attributes as given."""

    def __init__(self, **attributes):
        super().__init__()
        self.fc = nn.Linear(2, 2)
        for name, value in attributes.items():
            object.__setattr__(self, name, value)

    def double(self, x):
        return 2 * x

    def triple(self, x):
        return 3 * x

    def forward(self, x):
        return self.fc(x)


def holder(change=None, **attributes):
    """A Holder after `change(model)`."""
    model = Holder(**attributes)
    if change is not None:
        change(model)
    return model


def scaled_by(factor):
    return lambda x: factor * x


def mlp(hidden=8, p=0.1):
    return nn.Sequential(
        OrderedDict(
            a=nn.Linear(4, hidden), act=nn.ReLU(), drop=nn.Dropout(p), b=nn.Linear(hidden, 2)
        )
    )


def tied():
    model = nn.ModuleDict({"encoder": nn.Linear(3, 3), "decoder": nn.Linear(3, 3)})
    model["decoder"].weight = model["encoder"].weight
    return model


def ran_once(model, *shape):
    model(torch.randn(*shape))
    return model


def with_(**attributes):
    return lambda: holder(**attributes)


def edited(change, make=holder):
    """A constructor whose model goes through `change`."""

    def build():
        model = make()
        change(model)
        return model

    return build


def buffer(value, **options):
    return edited(lambda m: m.register_buffer("table", value, **options))


def layer(*args, **kwargs):
    return lambda: nn.Linear(*args, **kwargs)


X, Y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
NAN = float("nan")


def assert_equal_builds(make):
    models = [make() for _ in range(3)]
    assert [str(difference) for difference in compare_members(models)] == []
    check_members(models)


def assert_equals_its_copy(model):
    assert [str(difference) for difference in compare_members([model, copy.deepcopy(model)])] == []


def assert_told(first, second, *expected):
    """The differences of `second()` from `first()` are the expected ones, by their beginnings."""
    found = sorted(str(difference) for difference in compare_members([first(), second()]))
    assert len(found) == len(expected), found
    for line, text in zip(found, sorted(expected), strict=True):
        assert line.startswith(f"member 1, {text}")
