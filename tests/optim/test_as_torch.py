"""What torch's optimizers offer beside a step: hooks, closures, scaling, states, copies, groups."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from solo_training import (
    KINDS,
    Kind,
    N,
    assert_trained_alike,
    everything,
    make_data,
    make_models,
    member_losses,
    mlp,
    pair,
    train_ensemble,
    train_solo,
)

from unisono import Ensemble, optim, per_member

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
values = pytest.mark.parametrize("which", ["default", "equal", "each"])


def assert_bitwise(one: tuple[Ensemble, Any], other: tuple[Ensemble, Any]) -> None:
    first, second = everything(*one), everything(*other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)  # weights_only, torch's default


@kinds
@values
def test_a_saved_and_loaded_state_goes_on_bitwise(kind: Kind, which: str) -> None:
    ens, ours, _, _ = pair(kind, which, make_models("mlp"))
    data = make_data("mlp", 4)
    train_ensemble(ens, ours, data[:2])
    ours.param_groups[-1]["lr"] = 0.123  # as a scheduler would
    resumed, theirs, _, _ = pair(kind, which, make_models("mlp"))
    resumed.load_state_dict(through_a_file(ens.state_dict()))
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    assert theirs.param_groups[-1]["lr"] == 0.123
    train_ensemble(ens, ours, data[2:])
    train_ensemble(resumed, theirs, data[2:])
    assert_bitwise((ens, ours), (resumed, theirs))


@kinds
@values
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_their_own_way(kind: Kind, which: str, copied: Any) -> None:
    ens, ours, _, _ = pair(kind, which, make_models("mlp"))
    data = make_data("mlp", 4)
    train_ensemble(ens, ours, data[:2])
    other, theirs = copied((ens, ours))
    assert {id(p) for p in theirs.param_groups[0]["params"]} == {id(p) for p in other.parameters()}
    before = everything(other, theirs)
    train_ensemble(ens, ours, data[2:])
    after = everything(other, theirs)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    train_ensemble(other, theirs, data[2:])
    assert_bitwise((ens, ours), (other, theirs))


@kinds
def test_copies_follow_the_ensemble_that_was_copied_with_them(kind: Kind) -> None:
    ens, ours, _, _ = pair(kind, "each", make_models("mlp"))
    train_ensemble(ens, ours, make_data("mlp", 2))
    other, theirs = copy.deepcopy((ens, ours))
    other.copy_(0, 2)
    for state in theirs.state.values():
        assert all(torch.equal(value[2], value[0]) for value in state.values())


@kinds
@pytest.mark.parametrize("which", ["default", "equal"])
def test_a_state_of_the_namesake_is_taken_over(kind: Kind, which: str) -> None:
    models = make_models("mlp")
    ens, ours, solo, theirs = pair(kind, which, models)
    data = make_data("mlp", 4)
    namesake = kind.torchs(ens.parameters(), **kind.values(which))
    train_ensemble(ens, namesake, data[:2])
    train_solo(solo, theirs, data[:2])
    ours.load_state_dict(through_a_file(namesake.state_dict()))
    train_ensemble(ens, ours, data[2:])
    train_solo(solo, theirs, data[2:])
    assert_trained_alike(ens, ours, solo, theirs)


def test_a_closure_is_called_with_gradients_and_its_loss_returned() -> None:
    ens = Ensemble(make_models("mlp"))
    optimizer = optim.SGD(ens, lr=0.1)
    x = make_data("mlp", 1)[0]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = member_losses(ens(per_member(x))).sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure, active=[True] * N) < first
    assert optimizer.step(closure, active=[False] * N) is not None


def test_hooks_run_around_each_step() -> None:
    ens = Ensemble(make_models("mlp"))
    optimizer = optim.Adam(ens)
    calls: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", kwargs)))
    optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", kwargs)))
    train_ensemble(ens, optimizer, make_data("mlp", 1), active=[True, True, False])
    assert calls == [
        ("pre", {"active": [True, True, False]}),
        ("post", {"active": [True, True, False]}),
    ]


def test_the_profiler_shows_steps() -> None:
    ens = Ensemble(make_models("mlp"))
    optimizer = optim.AdamW(ens)
    with torch.profiler.profile() as profile:
        train_ensemble(ens, optimizer, make_data("mlp", 1))
    names = {event.key for event in profile.key_averages()}
    assert "Optimizer.step#AdamW.step" in names


@kinds
@pytest.mark.parametrize("which", ["equal", "each"])
def test_a_grad_scaler_scales_and_skips(kind: Kind, which: str) -> None:
    models = make_models("mlp")
    ens, ours, solo, theirs = pair(kind, which, models)
    data = make_data("mlp", 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for k, x in enumerate(data):
        ours.zero_grad()
        scaler.scale(member_losses(ens(per_member(x))).sum()).backward()
        if k == 1:  # as an overflow would
            ens.members.get_parameter("0.weight").grad[1] = float("inf")
        scaler.step(ours)
        scaler.update()
    train_solo(solo, theirs, [data[0], data[2]])
    assert_trained_alike(ens, ours, solo, theirs)


def test_zero_grad_reaches_each_parameter_once() -> None:
    ens = Ensemble(make_models("mlp"))
    optimizer = optim.Adam(ens, lr=[0.1, 0.2, 0.3])
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    assert list(map(id, listed)) == list(map(id, ens.parameters()))
    train_ensemble(ens, optimizer, make_data("mlp", 1))
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in ens.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in ens.parameters())


@kinds
def test_parameters_without_gradient_are_skipped(kind: Kind) -> None:
    ens, ours, solo, theirs = pair(kind, "each", make_models("mlp"))
    for model in (ens.members, *solo):
        model.get_parameter("0.weight").requires_grad_(False)
    data = make_data("mlp", 4)
    train_ensemble(ens, ours, data[:2])
    train_solo(solo, theirs, data[:2])
    assert ens.members.get_parameter("0.weight") not in ours.state
    for model in (ens.members, *solo):
        model.get_parameter("0.weight").requires_grad_(True)
    # From here on it stands at other steps than the rest.
    train_ensemble(ens, ours, data[2:])
    train_solo(solo, theirs, data[2:])
    assert_trained_alike(ens, ours, solo, theirs)


@pytest.mark.parametrize("at_once", [True, False], ids=["params", "add_param_group"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "tensors"])
def test_groups_with_values_of_their_own(at_once: bool, named: bool) -> None:
    models = make_models("mlp")
    ens = Ensemble(models, strategy="fused")
    rates = [0.1, 0.03, 0.01]

    def groups(module: Any, member: int | None) -> list[dict[str, Any]]:
        first, last = ({n: p for n, p in module.named_parameters() if n[0] == k} for k in "02")
        decays = [0.0, 0.1, 0.2]
        return [
            {"params": list(first.items()) if named else list(first.values()), "lr": 0.05},
            {
                "params": list(last.items()) if named else list(last.values()),
                "weight_decay": decays if member is None else decays[member],
                "label": "head",
            },
        ]

    mine = groups(ens.members, None)
    mine[0] |= {"lr": 0.05, "betas": (0.8, 0.9)}
    ours = optim.Adam(ens, lr=rates, params=mine if at_once else mine[:1])
    if not at_once:
        ours.add_param_group(mine[1])
    theirs = []
    for i, model in enumerate(models):
        own = groups(model, i)
        own[0] |= {"betas": (0.8, 0.9)}
        theirs.append(torch.optim.Adam(own, lr=rates[i]))

    assert [group["member"] for group in ours.param_groups] == [None, 0, 1, 2]
    assert [group.get("label") for group in ours.param_groups] == [None, *["head"] * 3]
    assert [group["lr"] for group in ours.param_groups] == [0.05, *rates]
    data = make_data("mlp", 3)
    train_ensemble(ens, ours, data)
    train_solo(models, theirs, data)
    assert_trained_alike(ens, ours, models, theirs)
    other = Ensemble(make_models("mlp"))
    again = optim.Adam(other, lr=rates, params=None)
    assert [group["member"] for group in again.param_groups] == [0, 1, 2]
    part = ours.select(ens[[2, 1]], [2, 1])
    assert [group["member"] for group in part.param_groups] == [None, 0, 1]
    assert [group["lr"] for group in part.param_groups] == [0.05, 0.01, 0.03]


@kinds
def test_permuted_members_have_permuted_results(kind: Kind) -> None:
    models = make_models("mlp")
    order = [2, 0, 1]
    values = {k: [v[i] for i in order] for k, v in kind.each.items()}
    data = make_data("mlp", 3)
    ens, permuted = Ensemble(models), Ensemble([models[i] for i in order])
    ours, theirs = kind.ours(ens, **kind.each), kind.ours(permuted, **values)
    train_ensemble(ens, ours, data)
    train_ensemble(permuted, theirs, [x[order] for x in data])
    first, second = everything(ens, ours), everything(permuted, theirs)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor[order])


@pytest.mark.parametrize(
    "convert", [list, tuple, torch.tensor, lambda v: torch.tensor(v).double().numpy()]
)
def test_kinds_of_sequences(convert: Any) -> None:
    ens = Ensemble([mlp() for _ in range(2)])
    pairs = [(0.9, 0.99), (0.5, 0.75)]
    optimizer = optim.Adam(
        ens, lr=convert([0.25, 0.5]), betas=convert(pairs), amsgrad=[True, False]
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert all(type(group["lr"]) is float for group in optimizer.param_groups)
    assert optimizer.param_groups[1]["betas"] == pytest.approx((0.5, 0.75))
    assert [group["amsgrad"] for group in optimizer.param_groups] == [True, False]


def test_defaults_are_those_of_the_namesakes() -> None:
    ens = Ensemble(make_models("mlp"))
    for kind in KINDS.values():
        theirs = kind.torchs(ens.parameters()).param_groups[0]
        ours = kind.ours(ens).param_groups[0]
        names = {spec.name for spec in kind.ours.method.hyperparameters}
        assert names == theirs.keys() - {
            "params",
            "foreach",
            "fused",
            "capturable",
            "differentiable",
        }
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_it_prints_whose_group_it_is() -> None:
    ens = Ensemble(make_models("mlp"))
    text = repr(optim.SGD(ens, lr=[0.1, 0.2, 0.3]))
    assert "lr: 0.3\n    maximize: False\n    member: 2" in text
