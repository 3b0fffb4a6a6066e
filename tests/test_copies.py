import dataclasses
import datetime
import decimal
import enum
import logging
import math
import pathlib
import random
import threading
from collections import OrderedDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch

from members import (
    Holder,
    ListWithName,
    assert_equal_builds,
    assert_equals_its_copy,
    assert_told,
    holder,
    with_,
)
from unisono.differences import compare_members


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Config:
    width: int = 4
    rates: tuple = (0.1, 0.2)
    color: Color = Color.RED
    cache: dict = dataclasses.field(default_factory=dict, compare=False)


class Slots:
    __slots__ = ("x", "y")

    def __init__(self, x):
        self.x = x


class Plain:
    def __init__(self, **values):
        vars(self).update(values)


Point = namedtuple("Point", "x y")


MODELS = {
    "dataclass": lambda: holder(config=Config(cache={"a": [1, Config(3)]})),
    "objects": lambda: holder(a=Plain(x=Plain(y=1)), b=Slots(1), c=Color.RED, d=ListWithName([1])),
    "standard library": lambda: holder(
        a=pathlib.Path("data"),
        b=datetime.timedelta(1),
        c=decimal.Decimal("0.1"),
        d=deque([1, Plain(x=2)]),
        e=defaultdict(list, a=[1]),
        f=Point(1, Plain(x=1)),
        g=frozenset({"a", "b"}),
        h=float("nan"),
        i=threading.Lock(),
        j=logging.getLogger("some.name"),
        k=math,
        m=object(),
        n=OrderedDict(a=1),
        o=slice(1, None),
    ),
    "random numbers": lambda: holder(
        a=torch.Generator().manual_seed(random.getrandbits(32)),
        b=np.random.default_rng(),
        c=random.Random(),
    ),
    "compiled in place": lambda: holder(lambda m: vars(m).update(_compiled_call_impl=object())),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_two_builds_are_equal(make):
    assert_equal_builds(make)


# A lock has no copies.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "standard library"])
def test_a_copy_is_equal(name):
    assert_equals_its_copy(MODELS[name]())


# member 0, member 1, and all that is said of member 1.
DIFFERENT = {
    "enum": (
        with_(color=Color.RED),
        with_(color=Color.BLUE),
        "`color`: <Color.BLUE: 2>; member 0 has <Color.RED: 1>",
    ),
    "dataclass": (
        with_(config=Config(cache={"a": 1})),
        with_(config=Config(width=5, cache={"a": 2})),
        "`config.cache['a']`: 2; member 0 has 1",
        "`config.width`: 5; member 0 has 4",
    ),
    "objects": (
        lambda: holder(a=Plain(x=Plain(y=1)), b=Slots(1)),
        lambda: holder(a=Plain(x=Plain(y=2)), b=Slots(2)),
        "`a.x.y`: 2; member 0 has 1",
        "`b.x`: 2; member 0 has 1",
    ),
    "objects of other classes": (
        with_(a=Plain(x=1)),
        with_(a=Slots(1)),
        f"`a`: object of class {__name__}.Slots; member 0 has object of class {__name__}.Plain",
    ),
    "standard library": (
        with_(a=pathlib.PurePosixPath("a"), b=decimal.Decimal(1), c=deque([1]), d=math),
        with_(a=pathlib.PurePosixPath("b"), b=decimal.Decimal(2), c=deque([2]), d=random),
        "`a`: PurePosixPath('b'); member 0 has PurePosixPath('a')",
        "`b`: Decimal('2'); member 0 has Decimal('1')",
        "`c`: deque([2]); member 0 has deque([1])",
        "`d.__name__`: 'random'; member 0 has 'math'",
    ),
    "named tuple": (
        with_(point=Point(1, 2)),
        with_(point=Point(1, 3)),
        "`point[1]`: 3; member 0 has 2",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT.values(), ids=DIFFERENT)
def test_a_difference_is_told_with_path_and_both_values(case):
    assert_told(*case)


def test_what_a_class_leaves_out_of_copies_is_not_compared():
    class Attached(Holder):  # as a LightningModule leaves out its trainer
        def __getstate__(self):
            return {**vars(self), "trainer": None}

    models = [Attached(trainer=1), Attached(trainer=2)]
    assert compare_members(models) == []
