import copy
import functools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from members import (
    NAN,
    ListWithName,
    assert_equal_builds,
    assert_equals_its_copy,
    assert_told,
    edited,
    holder,
    mlp,
    scaled_by,
    with_,
)
from unisono import Ensemble
from unisono.differences import check_members, compare_members


def scaled_by_default(factor):
    def scaled(x, f=factor, *, g=factor):
        return x * f * g

    return scaled


def with_bound_methods():
    def bind(model):
        model.f = model.double
        model.g = functools.partial(model.double, 3)
        model.fc.register_forward_hook(model.triple)

    return holder(bind)


def with_references():
    def refer(model):
        model.weights = [model.fc.weight, model.fc.bias]
        model.layers = {"first": model.fc}
        model.chosen = {model.fc}
        model.by_layer = {model.fc: "first"}

    return holder(refer)


def hidden_modules():
    layers = [nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2))]
    nn.init.ones_(layers[0].weight)
    nn.init.zeros_(layers[0].bias)
    return holder(layers=layers, acts={nn.ReLU(), nn.Tanh()})


def cyclic(value):
    table = [value]
    table.append(table)
    return with_(table=table)


def refer(name):
    return edited(lambda m: setattr(m, "chosen", [getattr(m.fc, name)]))


MODELS = {
    "lambda": lambda: holder(act=lambda x: x),
    "closure": lambda: holder(act=scaled_by(0.5), nested=scaled_by(scaled_by(2))),
    "defaults": lambda: holder(act=scaled_by_default(0.5)),
    "decorated": lambda: holder(act=functools.wraps(print)(scaled_by(1))),
    "cached": lambda: holder(act=functools.lru_cache(scaled_by(1))),
    "partial": lambda: holder(act=functools.partial(F.leaky_relu, negative_slope=0.3)),
    "functions": lambda: holder(a=torch.relu, b=F.max_pool2d, c=torch.tensor([1.0]).add, d=math),
    "methods": with_bound_methods,
    "numpy": lambda: holder(a=np.array([1.0, np.nan]), b=np.float32(2), c=np.array([{"a": 1}])),
    "plain tensors": lambda: holder(
        a=torch.tensor([1.0, float("nan")]), b=torch.empty(0), c=torch.tensor(True), d=1j
    ),
    "unusual tensors": lambda: holder(
        a=torch.eye(3).to_sparse(),
        b=torch.ones(3, dtype=torch.float8_e4m3fn),
        c=torch.tensor([1 + 2j]).conj(),
        d=torch.ones(1).expand(4),
        e=torch.ones(2, 3).T,
        f=torch.empty(3, device="meta"),
    ),
    "references": with_references,
    "hidden modules": hidden_modules,
    "dtypes": lambda: holder(a=torch.float16, b=torch.device("cpu"), c=torch.Size([1, 2])),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_two_builds_are_equal(make):
    assert_equal_builds(make)


# A method of a tensor has no copies.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "functions"])
def test_a_copy_is_equal(name):
    assert_equals_its_copy(MODELS[name]())


# member 0, member 1, and all that is said of member 1.
DIFFERENT = {
    "dropout": (lambda: mlp(p=0.1), lambda: mlp(p=0.2), "`drop.p`: 0.2; member 0 has 0.1"),
    "stride": (
        lambda: nn.Conv2d(1, 1, 1, stride=(1, 1)),
        lambda: nn.Conv2d(1, 1, 1, stride=(1, 2)),
        "`stride[1]`: 2; member 0 has 1",
    ),
    "activation": (
        with_(act=torch.relu),
        with_(act=torch.tanh),
        "`act.__name__`: 'tanh'; member 0 has 'relu'",
    ),
    "type of a number": (
        with_(a=True, b=1.0, c=(1,)),
        with_(a=1, b=1, c=[1]),
        "`a`: 1; member 0 has True",
        "`b`: 1; member 0 has 1.0",
        "`c`: [1]; member 0 has (1,)",
    ),
    "NaN and None": (
        with_(a=NAN, b=None),
        with_(a=1.0, b="x"),
        "`a`: 1.0; member 0 has nan",
        "`b`: 'x'; member 0 has None",
    ),
    "strings": (
        with_(mode="bilinear"),
        with_(mode="nearest"),
        "`mode`: 'nearest'; member 0 has 'bilinear'",
    ),
    "attribute missing": (with_(a=1), holder, "`a`: missing; member 0 has 1"),
    "attribute extra": (holder, with_(a=1), "`a`: 1; member 0 has nothing of that name"),
    "list": (
        with_(sizes=[1, [2, 3]]),
        with_(sizes=[1, [2, 4]]),
        "`sizes[1][1]`: 4; member 0 has 3",
    ),
    "length": (
        with_(sizes=[1], layers=[len]),
        with_(sizes=[1, 2], layers=[len, len]),
        "`layers`: list of length 2; member 0 has list of length 1",
        "`sizes`: [1, 2]; member 0 has [1]",
    ),
    "list with an attribute": (
        edited(lambda m: setattr(m.sizes, "name", "a"), with_(sizes=ListWithName([1]))),
        edited(lambda m: setattr(m.sizes, "name", "b"), with_(sizes=ListWithName([1]))),
        "`sizes.name`: 'b'; member 0 has 'a'",
    ),
    "dict": (
        with_(table={"a": 1, "b": 2}),
        with_(table={"a": 3, "c": 2}),
        "`table['a']`: 3; member 0 has 1",
        "`table['b']`: missing; member 0 has 2",
        "`table['c']`: 2; member 0 has nothing of that name",
    ),
    "order of a dict": (
        with_(table={"a": 1, "b": 2}),
        with_(table={"b": 2, "a": 1}),
        "`table`: keys in order ('b', 'a'); member 0 has keys in order ('a', 'b')",
    ),
    "default of a dict": (
        with_(table=defaultdict(list)),
        with_(table=defaultdict(set)),
        "`table.default_factory`: class set; member 0 has class list",
    ),
    "keys of other kinds": (
        lambda: holder(table={nn.ReLU(): 1}),
        lambda: holder(table={nn.ReLU(): 2}),
        "`table[0][1]`: 2; member 0 has 1",
    ),
    "set": (
        with_(names={"b", "a"}, acts={1, 2}),
        with_(names={"c", "a"}, acts={1}),
        "`acts`: {1}; member 0 has {1, 2}",
        "`names`: {'a', 'c'}; member 0 has {'a', 'b'}",
    ),
    "set of modules": (
        lambda: holder(acts={nn.ReLU(), nn.Dropout(0.1)}),
        lambda: holder(acts={nn.ReLU(), nn.Dropout(0.2)}),
        "`acts`: set of length 2 (with other contents); member 0 has set of length 2",
    ),
    "cycle": (cyclic(1), cyclic(2), "`table[0]`: 2; member 0 has 1"),
    "class as attribute": (
        with_(norm=nn.BatchNorm1d),
        with_(norm=nn.LayerNorm),
        (
            "`norm`: class torch.nn.modules.normalization.LayerNorm; member 0 has "
            "class torch.nn.modules.batchnorm.BatchNorm1d"
        ),
    ),
    "closure": (
        lambda: holder(act=scaled_by(2)),
        lambda: holder(act=scaled_by(3)),
        "`act (closure factor)`: 3; member 0 has 2",
    ),
    "default of a function": (
        lambda: holder(act=scaled_by_default(2)),
        lambda: holder(act=scaled_by_default(3)),
        "`act.__defaults__[0]`: 3; member 0 has 2",
        "`act.__kwdefaults__['g']`: 3; member 0 has 2",
    ),
    "partial": (
        with_(act=functools.partial(F.leaky_relu, 1, negative_slope=0.1)),
        with_(act=functools.partial(F.leaky_relu, 2, negative_slope=0.2)),
        "`act.args[0]`: 2; member 0 has 1",
        "`act.keywords['negative_slope']`: 0.2; member 0 has 0.1",
    ),
    "method of another submodule": (
        edited(lambda m: setattr(m, "act", m.forward)),
        edited(lambda m: setattr(m, "act", m.fc.forward)),
        "`act.__func__`: function Linear.forward",
        "`act.__self__`: the module `fc`; member 0 has the model itself",
    ),
    "array": (
        with_(a=np.array([[NAN, 1.0]]), b=np.zeros(2), c=np.array(["a"], dtype=object)),
        with_(a=np.array([[NAN, 2.0]]), b=np.zeros(3), c=np.array(["b"], dtype=object)),
        "`a`: array, values differ, first at (0, 1): 2.0; member 0 has 1.0",
        "`b`: array of shape (3,), dtype float64; member 0 has array of shape (2,), dtype float64",
        "`c[0]`: 'b'; member 0 has 'a'",
    ),
    "reference to another tensor": (
        refer("weight"),
        refer("bias"),
        "`chosen[0]`: the tensor `fc.bias`; member 0 has the tensor `fc.weight`",
    ),
    "reference to no registered tensor": (
        refer("weight"),
        with_(chosen=[torch.ones(1)]),
        (
            "`chosen[0]`: a tensor that the member doesn't register; member 0 has the tensor "
            "`fc.weight`"
        ),
    ),
    "hidden module": (
        lambda: holder(layers=[nn.Sequential(nn.Dropout(0.1))]),
        lambda: holder(layers=[nn.Sequential(nn.Dropout(0.2))]),
        "`layers[0].0.p`: 0.2; member 0 has 0.1",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT.values(), ids=DIFFERENT)
def test_a_difference_is_told_with_path_and_both_values(case):
    assert_told(*case)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_functions_are_compared_by_the_function():
    models = [holder(act=torch.compile(scaled_by(2), backend="eager")) for _ in range(2)]
    for model in models:
        model.act(torch.ones(1))
    check_members(models)
    models = [holder(act=torch.compile(scaled_by(i))) for i in range(2)]
    [difference] = compare_members(models)
    assert str(difference) == "member 1, `act (closure factor)`: 1; member 0 has 0"


def test_a_parametrised_member_that_was_copied_once_is_still_of_the_same_class() -> None:
    # copy and pickle note the names of slots in the class of what they copy
    models = [nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)) for _ in range(3)]
    copy.deepcopy(models[0])
    assert len(Ensemble(models)) == 3
    assert len(Ensemble(models)) == 3
