import copy
import functools
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

from members import (
    Holder,
    holder,
    mlp,
)
from unisono import Ensemble
from unisono.differences import check_members, compare_members
from unisono.errors import IncompatibleMembersError, UnsupportedModelError


def refuse(error, models, *texts, **options):
    with pytest.raises(error, match=r"^Ensemble: ") as caught:
        check_members(models, **options)
    for text in texts:
        assert text in str(caught.value)
    return str(caught.value)


def test_no_model():
    refuse(IncompatibleMembersError, [], "at least one member, got an empty list")


def test_one_model_instead_of_a_list():
    for model in (mlp(), torch.ones(3)):
        refuse(UnsupportedModelError, model, "come as a list", "make_model() for _ in range(10)")
    check_members(nn.ModuleList([mlp(), mlp()]))


def test_other_things_than_modules():
    message = refuse(UnsupportedModelError, [mlp(), Holder], "member 1 is the class members.H")
    assert "models = [Holder() for _ in range(10)]" in message
    refuse(UnsupportedModelError, [torch.ones(2)], "member 0 is an object of type torch.Tensor.")
    refuse(UnsupportedModelError, [mlp(), mlp], "member 1 is the function mlp (")
    refuse(UnsupportedModelError, [None], "member 0 is an object of type NoneType.")


def test_one_model_many_times():
    model, other = mlp(), mlp()
    message = refuse(
        IncompatibleMembersError,
        [model, other, model, other, model],
        "\n  members 0, 2, 4\n  members 1, 3\n",
        "models = [make_model() for _ in range(5)]",
        "models = [copy.deepcopy(model) for _ in range(5)]",
    )
    assert "`[model] * 5` names one model 5 times" in message
    refuse(IncompatibleMembersError, [model] * 40, "members 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (40")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script_modules():
    model = nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(2, 2)))
    refuse(UnsupportedModelError, [mlp(), model], "`1` of member 1 is a ScriptModule", "jit.script")
    traced = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    refuse(UnsupportedModelError, [traced], "member 0 is a ScriptModule")


def test_lazy_modules():
    model = nn.Sequential(nn.LazyLinear(3))
    text = "`0` of member 1 is torch.nn.modules.linear.LazyLinear, which has no shape yet"
    refuse(UnsupportedModelError, [nn.Sequential(nn.Linear(2, 3)), model], text, "Run each model")
    [lazy, *_] = compare_members([nn.Linear(2, 3), nn.LazyLinear(3)])
    assert "LazyLinear" in lazy.found
    refuse(UnsupportedModelError, [nn.LazyBatchNorm1d(affine=False)], "has no shape yet")


def test_data_parallel():
    model = nn.Sequential(nn.DataParallel(nn.Linear(2, 2)))
    refuse(UnsupportedModelError, [model], "`0` of member 0 is wrapped in torch.nn.parallel.data_")
    refuse(UnsupportedModelError, [model], "Pass the module inside, `model.module`")


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models():
    refuse(
        UnsupportedModelError,
        [torch.compile(mlp()), mlp()],
        "member 0 is wrapped by torch.compile",
        "torch.compile(Ensemble(models))",
    )


def test_members_with_a_parameter_in_common():
    weight = nn.Parameter(torch.zeros(2, 2))
    models = [holder(lambda m: setattr(m.fc, "weight", weight)) for _ in range(3)]
    message = refuse(
        IncompatibleMembersError,
        models,
        "  member 1, `fc.weight`: the memory of `fc.weight` of member 0\n"
        "  member 2, `fc.weight`: the memory of `fc.weight` of member 0\n",
        'Ensemble(models, shared=["fc.weight"])',
        "copy.deepcopy(model)",
    )
    assert "fc.bias" not in message
    check_members(models, shared=["fc.weight"])


def test_members_with_memory_in_common():
    data = torch.zeros(2, 2)
    models = [holder(lambda m: setattr(m.fc, "weight", nn.Parameter(data))) for _ in range(2)]
    refuse(IncompatibleMembersError, models, "`fc.weight`: the memory of `fc.weight` of member 0")


def test_members_with_a_submodule_in_common():
    backbone = mlp()
    models = [nn.Sequential(OrderedDict(body=backbone, head=nn.Linear(2, 2))) for _ in range(2)]
    message = refuse(
        IncompatibleMembersError, models, "member 1, `body`: the very module `body` of member 0"
    )
    assert "body.a" not in message
    assert 'Ensemble(models, shared=["body.*"])' in message
    assert Ensemble(models, shared=["body.*"]).members.head.weight.shape == (2, 2, 2)
    check_members(models, shared=[f"body.{name}" for name, _ in backbone.named_parameters()])
    refuse(IncompatibleMembersError, models, "`body`: the very", shared=["body.a.weight"])


def test_members_may_have_in_common_what_has_no_memory():
    relu, empty = nn.ReLU(), torch.empty(0)
    models = [nn.Sequential(nn.Linear(2, 2), relu) for _ in range(2)]
    check_members(models)
    models = [holder(lambda m: m.register_buffer("e", empty.detach())) for _ in range(2)]
    check_members(models)
    check_members([nn.Linear(2, 2, device="meta") for _ in range(2)])


def test_views_of_one_stacked_tensor_are_not_in_common():
    stacked = torch.randn(2, 3, 2)
    for dim in (0, 2):  # members one after the other, and interleaved
        models = [
            holder(lambda m, w=w: setattr(m.fc, "weight", nn.Parameter(w)))
            for w in stacked.movedim(0, dim).unbind(dim)
        ]
        check_members(models)


def captures_self(model):
    model.act = lambda x: model.fc(x)


def captures_parameter(model):
    weight = model.fc.weight
    model.acts = {"a": [lambda x: x @ weight]}


def captures_by_default(model):
    model.act = functools.partial(lambda x, fc=model.fc: fc(x))


def captures_by_hook(model):
    model.fc.register_forward_hook(lambda m, args, y: setattr(model, "last", y))


def captures_by_reference(model):
    model.root = weakref.ref(model)


def captures_by_builtin(model):
    model.add = model.fc.weight.add


def captures_nested(model):
    inner = functools.partial(print, model.fc)
    model.act = lambda x: inner(x)


CAPTURES = [
    (captures_self, "`act (closure model)`: the model itself"),
    (captures_parameter, "`acts['a'][0] (closure weight)`: the tensor `fc.weight`"),
    (captures_by_default, "`act.func.__defaults__[0]`: the module `fc`"),
    (captures_by_hook, "`fc._forward_hooks[0] (closure model)`: the model itself"),
    (captures_by_reference, "`root()`: the model itself"),
    (captures_by_builtin, "`add.__self__`: the tensor `fc.weight`"),
    (captures_nested, "`act (closure inner).args[0]`: the module `fc`"),
]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("capture", "text"), CAPTURES, ids=[f.__name__ for f, _ in CAPTURES])
def test_functions_that_hold_on_to_their_member(capture, text, n):
    models = [holder(capture) for _ in range(n)]
    message = refuse(UnsupportedModelError, models, "Make each a method", "def scaled(self, x):")
    for member in range(n):
        assert f"  member {member}, {text}\n" in message
    assert compare_members(models) == []


def test_a_function_copied_with_a_model_holds_on_to_the_original():
    model = holder(captures_self)
    refuse(UnsupportedModelError, [model, copy.deepcopy(model)], "member 0, `act (closure model)`")
    refuse(UnsupportedModelError, [copy.deepcopy(model), model], "member 1, `act (closure model)`")
