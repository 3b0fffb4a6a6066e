"""Single members of a larger optimizer: frozen ones, chosen ones, copied ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from solo_training import (
    KINDS,
    Kind,
    N,
    SharedBackbone,
    assert_trained_alike,
    everything,
    make_data,
    make_models,
    pair,
    train_ensemble,
    train_solo,
)
from torch import Tensor, nn

from unisono import Ensemble, optim
from unisono.optim import paths

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
values = pytest.mark.parametrize("which", ["equal", "each"])
large = pytest.mark.parametrize("large", [0, 10**9], ids=["kernel", "passes"])
MASKS = {
    "list": lambda mask: mask,
    "tuple": tuple,
    "array": np.array,
    "array items": lambda mask: list(np.array(mask)),
    "tensor": torch.tensor,
}


def rows(tensors: dict[str, Tensor], member: int) -> dict[str, Tensor]:
    return {name: tensor[member] for name, tensor in tensors.items()}


def assert_bitwise(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@kinds
@values
@large
def test_frozen_members_stay_bitwise_and_the_others_train_as_by_themselves(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, which: str, large: int
) -> None:
    monkeypatch.setattr(paths, "LARGE_MEMBER", large)
    ens, ours, solo, theirs = pair(kind, which, make_models("mlp"))
    data = make_data("mlp", 6)
    train_ensemble(ens, ours, data[:2])
    before = everything(ens, ours)
    poisoned = [x.clone() for x in data[2:4]]
    for x in poisoned:
        x[1] = float("nan")
    train_ensemble(ens, ours, poisoned, active=[True, False, True])
    assert_bitwise(rows(everything(ens, ours), 1), rows(before, 1))
    train_ensemble(ens, ours, data[4:])

    for i, steps in ((0, data), (1, data[:2] + data[4:]), (2, data)):
        train_solo(solo[i : i + 1], theirs[i : i + 1], [x[i : i + 1] for x in steps])
    assert_trained_alike(ens, ours, solo, theirs)


@pytest.mark.parametrize("kind", MASKS)
def test_kinds_of_masks(kind: str) -> None:
    ens = Ensemble(make_models("mlp"))
    optimizer = optim.SGD(ens, lr=0.1)
    before = everything(ens, optimizer)
    train_ensemble(ens, optimizer, make_data("mlp", 1), active=MASKS[kind]([False, True, False]))
    after = everything(ens, optimizer)
    name = "ens.members.0.bias"
    changed = [not torch.equal(after[name][i], before[name][i]) for i in range(N)]
    assert changed == [False, True, False]


@kinds
def test_a_first_step_of_one_member_starts_only_its_state(kind: Kind) -> None:
    ens, ours, solo, theirs = pair(kind, "each", make_models("mlp"))
    data = make_data("mlp", 4)
    for k, x in enumerate(data):
        active = [k >= start for start in (0, 2, 1)]
        train_ensemble(ens, ours, [x], active=active)
        for i in range(N):
            if active[i]:
                train_solo(solo[i : i + 1], theirs[i : i + 1], [x[i : i + 1]])
    assert_trained_alike(ens, ours, solo, theirs)


def test_shared_parameters_are_stepped_unless_nobody_is_active() -> None:
    backbone = nn.Linear(4, 6)
    models = [SharedBackbone(backbone).double() for _ in range(N)]
    ens = Ensemble(models, shared="backbone.*")
    optimizer = optim.Adam(ens, lr=0.1)
    weight = ens.members.backbone.weight
    ens(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    before = everything(ens, optimizer)
    optimizer.step(active=[False] * N)
    assert_bitwise(everything(ens, optimizer), before)
    optimizer.step(active=[False, True, False])
    assert not torch.equal(weight, before["ens.members.backbone.weight"])
    assert optimizer.state[weight]["step"].shape == ()
    assert optimizer.state[weight]["step"] == 1
    assert optimizer.state[ens.members.head.weight]["step"].tolist() == [0, 1, 0]


@kinds
@values
def test_chosen_members_train_on_and_come_home(kind: Kind, which: str) -> None:
    ens, ours, solo, theirs = pair(kind, which, make_models("mlp"))
    data = make_data("mlp", 6)
    train_ensemble(ens, ours, data[:2])
    train_solo(solo, theirs, data[:2])
    chosen = [2, 0]
    before = everything(ens, ours)
    small = ens[chosen]
    part = ours.select(small, chosen)
    train_ensemble(small, part, [x[chosen] for x in data[2:4]])
    assert type(part) is kind.ours
    assert [len(group["params"]) for group in part.param_groups] == (
        [4, 0] if which == "each" else [4]
    )
    assert_bitwise(everything(ens, ours), before)
    for i in chosen:
        train_solo(solo[i : i + 1], theirs[i : i + 1], [x[i : i + 1] for x in data[2:4]])
    assert_trained_alike(small, part, [solo[i] for i in chosen], [theirs[i] for i in chosen])

    with torch.no_grad():
        for name, tensor in ens.stacked_tensors().items():
            tensor[chosen] = small.stacked_tensors()[name]
    ours.write_back(part, chosen)
    assert_trained_alike(ens, ours, solo, theirs)
    assert_bitwise(rows(everything(ens, ours), 1), rows(before, 1))
    train_ensemble(ens, ours, data[4:])
    train_solo(solo, theirs, data[4:])
    assert_trained_alike(ens, ours, solo, theirs)


@kinds
def test_members_copied_over_others_have_their_state_and_keep_their_values(kind: Kind) -> None:
    ens, ours, _, _ = pair(kind, "each", make_models("mlp"))
    train_ensemble(ens, ours, make_data("mlp", 2))
    before = everything(ens, ours)
    rates = [group["lr"] for group in ours.param_groups]
    ours.copy_members([0, 1], [1, 2])
    after = everything(ens, ours)
    for name in after:
        if name.startswith("ens."):
            assert torch.equal(after[name], before[name])
        else:
            assert torch.equal(after[name][0], before[name][0])
            assert torch.equal(after[name][1:], before[name][:2])
    assert [group["lr"] for group in ours.param_groups] == rates


def test_copying_members_of_the_ensemble_copies_their_state() -> None:
    ens = Ensemble(make_models("mlp"))
    optimizer = optim.Adam(ens)
    train_ensemble(ens, optimizer, make_data("mlp", 2), active=[True, False, True])
    ens.copy_(0, 1)
    for state in optimizer.state.values():
        assert state["step"].tolist() == [2, 2, 2]
        assert torch.equal(state["exp_avg"][1], state["exp_avg"][0])


@kinds
@values
def test_what_changed_in_the_larger_optimizer_is_taken(kind: Kind, which: str) -> None:
    ens, ours, _, _ = pair(kind, which, make_models("mlp"))
    data = make_data("mlp", 4)
    train_ensemble(ens, ours, data[:2])
    small = ens[[2, 1]]
    part = ours.select(small, [2, 1])
    before = everything(small, part)
    train_ensemble(ens, ours, data[2:])
    for group in ours.param_groups:
        group["lr"] *= 0.5
        group["initial_lr"] = 7.0  # what a scheduler leaves
    part.take_hyperparameters(ours, [2, 1])
    assert_bitwise(everything(small, part), before)
    rates = [group["lr"] for group in ours.param_groups]
    expected = rates if which == "equal" else [rates[2], rates[1]]
    assert [group["lr"] for group in part.param_groups] == expected
    assert all(group["initial_lr"] == 7.0 for group in part.param_groups)
    assert [g["member"] for g in part.param_groups] == ([None] if which == "equal" else [0, 1])
    moments = {id(v) for kept in part.state.values() for v in kept.values()}
    part.take(ours, [2, 1])
    assert {id(v) for kept in part.state.values() for v in kept.values()} == moments  # in place
    for name, p in small.members.named_parameters():
        theirs = ours.state[ens.members.get_parameter(name)]
        assert part.state[p].keys() == theirs.keys()
        for key, value in theirs.items():
            assert torch.equal(part.state[p][key], value[[2, 1]])


def test_state_that_is_new_or_not_there_yet_comes_home() -> None:
    ens = Ensemble(make_models("mlp"))
    ours = optim.Adam(ens)
    part = ours.select(ens[[0, 2]], [0, 2])
    part.take(ours, [0, 2])
    assert not ours.state
    assert not part.state
    train_ensemble(part._ens, part, make_data("mlp", 2, 2))
    ours.write_back(part, [0, 2])
    for p, kept in ours.state.items():
        assert kept["step"].tolist() == [2, 0, 2]
        assert kept["exp_avg"].shape == p.shape
        assert not kept["exp_avg"][1].any()
    fresh = ours.select(ens[[0]], [0])
    fresh.state.clear()  # as if nobody had stepped
    ours.write_back(fresh, [0])
    for kept in ours.state.values():
        assert kept["step"].tolist() == [0, 0, 2]
        assert not kept["exp_avg_sq"][0].any()


def test_the_state_of_shared_parameters_goes_along_as_a_whole() -> None:
    models = [SharedBackbone(nn.Linear(4, 6)).double() for _ in range(N)]
    for model in models:
        model.backbone = models[0].backbone
    ens = Ensemble(models, shared="backbone.*")
    own, shared = (list(ens.members.get_submodule(n).parameters()) for n in ("head", "backbone"))
    groups = [{"params": own}, {"params": shared, "lr": 0.2}]
    ours = optim.Adam(ens, lr=[0.1, 0.2, 0.3], params=groups)
    data = torch.randn(4, 5, 4, dtype=torch.float64)

    def train(target: Ensemble, optimizer: optim.Adam, x: Tensor) -> None:
        optimizer.zero_grad()
        target(x).square().sum().backward()
        optimizer.step()

    train(ens, ours, data[0])
    small = ens[[1, 2]]
    part = ours.select(small, [1, 2])
    assert [group["member"] for group in part.param_groups] == [0, 1, None]
    train(small, part, data[1])
    ours.write_back(part, [1, 2])
    mine = ours.state[ens.members.backbone.weight]
    theirs = part.state[small.members.backbone.weight]
    assert mine["step"] == 2
    assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
    ours.copy_members(1, 0)
    assert mine["step"].shape == ()
    assert ours.state[ens.members.head.weight]["step"].tolist() == [2, 2, 2]
    train(ens, ours, data[2])
    part.take(ours, [1, 2])
    assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
    assert theirs["step"] == 3
