import copy
import time

import pytest
import torch
from torch import nn

from members import (
    holder,
    mlp,
    ran_once,
    tied,
)
from unisono.differences import check_members, compare_members
from unisono.errors import Difference, IncompatibleMembersError


def test_differences_are_data():
    [difference] = compare_members([mlp(p=0.1), mlp(p=0.1), mlp(p=0.2)])
    assert difference == Difference(member=2, path="drop.p", found="0.2", expected="0.1")


def test_all_differences_come_in_one_pass_by_member_then_by_the_module_tree():
    models = [mlp(), mlp(hidden=9, p=0.2), mlp(), mlp(p=0.3)]
    models[3].b.eval()
    found = [(d.member, d.path) for d in compare_members(models)]
    first = ["a.weight", "a.bias", "a.out_features", "drop.p", "b.weight", "b.in_features"]
    assert found == [*((1, path) for path in first), (3, "drop.p"), (3, "b")]


def test_no_or_one_model_has_no_differences():
    assert compare_members([]) == []
    assert compare_members([mlp()]) == []


def test_models_and_random_numbers_stay_untouched():
    models = [ran_once(nn.LSTM(3, 4), 5, 2, 3), nn.LSTM(3, 5)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    names, numbers = [list(vars(model)) for model in models], torch.get_rng_state()
    compare_members(models)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [list(vars(model)) for model in models] == names
    for model, state in zip(models, before, strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name])


def test_the_message_in_full():
    models = [mlp(), mlp(), mlp(p=0.2), mlp(hidden=9)]
    with pytest.raises(IncompatibleMembersError, match="2 of 4 differ") as caught:
        check_members(models)
    assert (
        str(caught.value)
        == """\
Ensemble: members must share one architecture, but 2 of 4 differ from member 0:

  member 2, `drop.p`: 0.2; member 0 has 0.1
  member 3, `a.weight`: shape (9, 4); member 0 has shape (8, 4)
  member 3, `a.bias`: shape (9,); member 0 has shape (8,)
  member 3, `a.out_features`: 9; member 0 has 8
  member 3, `b.weight`: shape (2, 9); member 0 has shape (2, 8)
  member 3, `b.in_features`: 9; member 0 has 8

One copy of the module's code runs for all members, so everything except tensor
values has to agree. Build them from one constructor:

    models = [make_model() for _ in range(4)]"""
    )
    assert list(caught.value.differences) == compare_members(models)


def test_a_long_list_is_cut_and_kept_whole_as_data():
    models = [mlp(p=0.1), *(mlp(p=i / 20) for i in range(3, 16))]
    with pytest.raises(IncompatibleMembersError, match="13 of 14 differ") as caught:
        check_members(models)
    assert "  member 10, `drop.p`: 0.6; member 0 has 0.1\n  ... and 3 more\n" in str(caught.value)
    assert "member 11" not in str(caught.value)
    assert len(caught.value.differences) == 13


def test_plain_tensors_and_hidden_modules_come_with_the_remedy():
    models = [holder(layers=[nn.Linear(2, 2)]) for _ in range(2)]
    with pytest.raises(IncompatibleMembersError, match=r"nn\.ModuleList\(modules\)") as caught:
        check_members(models)
    assert "`layers[0].weight`: plain tensor, values differ, first at (0, 0)" in str(caught.value)
    assert "register_buffer(name, tensor)" in str(caught.value)


def test_values_of_shared_tensors_must_agree():
    first, second = mlp(), mlp()
    second.load_state_dict(first.state_dict())
    assert compare_members([first, second], shared=["a.weight", "a.bias"]) == []
    first.a.weight.data[2, 1] = 0.5
    second.a.weight.data[2, 1] = 0.25
    [difference] = compare_members([first, second], shared=["a.weight", "a.bias"])
    assert str(difference) == (
        "member 1, `a.weight`: values differ, first at (2, 1): 0.25; member 0 has 0.5"
    )
    assert compare_members([first, second]) == []


@pytest.mark.parametrize("name", ["encoder.weight", "decoder.weight"])
def test_a_shared_tensor_may_be_named_by_any_of_its_ties(name):
    first, second = tied(), tied()
    [difference] = compare_members([first, second], shared=[name])
    assert difference.path == "encoder.weight"


def test_a_thousand_members_take_about_a_second():
    models = [mlp() for _ in range(1000)]
    start = time.perf_counter()
    compare_members(models)
    assert time.perf_counter() - start < 2
