"""The schedulers of torch change an ensemble's rates as they change those of N solo optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from solo_training import (
    KINDS,
    N,
    assert_trained_alike,
    make_data,
    make_models,
    pair,
    row,
    train_ensemble,
    train_solo,
)
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

STEPS = 6

# Name -> what makes the scheduler, from values that may be lists of one per member.
SCHEDULERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "LambdaLR": (
        lrs.LambdaLR,
        {"lr_lambda": [lambda t: 0.9**t, lambda t: 1 / (t + 1), lambda t: t]},
    ),
    "MultiplicativeLR": (
        lrs.MultiplicativeLR,
        {"lr_lambda": [lambda t: 0.9, lambda t: 0.5, lambda t: 1.1]},
    ),
    "StepLR": (lrs.StepLR, {"step_size": 2}),
    "MultiStepLR": (lrs.MultiStepLR, {"milestones": (1, 4)}),
    "ConstantLR": (lrs.ConstantLR, {"factor": 0.3, "total_iters": 3}),
    "LinearLR": (lrs.LinearLR, {"total_iters": 3}),
    "ExponentialLR": (lrs.ExponentialLR, {"gamma": 0.8}),
    "PolynomialLR": (lrs.PolynomialLR, {"total_iters": 4, "power": 2}),
    "CosineAnnealingLR": (lrs.CosineAnnealingLR, {"T_max": 4}),
    "CosineAnnealingWarmRestarts": (lrs.CosineAnnealingWarmRestarts, {"T_0": 2}),
    "CyclicLR": (
        lrs.CyclicLR,
        {"base_lr": [0.01, 0.02, 0.03], "max_lr": [0.1, 0.2, 0.3], "step_size_up": 2},
    ),
    "OneCycleLR": (lrs.OneCycleLR, {"max_lr": [0.1, 0.2, 0.3], "total_steps": STEPS}),
    "ReduceLROnPlateau": (
        lrs.ReduceLROnPlateau,
        {"patience": 0, "factor": 0.5, "min_lr": [0.02, 0.001, 0.0]},
    ),
    "SWALR": (SWALR, {"swa_lr": [0.1, 0.2, 0.3], "anneal_epochs": 3}),
    "SequentialLR": (
        lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)], [2]),
        {},
    ),
    "ChainedScheduler": (
        lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)]),
        {},
    ),
}


def schedule(
    name: str, optimizer: torch.optim.Optimizer, values: dict[str, Any]
) -> Callable[[], Any]:
    """A function that makes one step of a scheduler."""
    scheduler = SCHEDULERS[name][0](optimizer, **values)
    if name != "ReduceLROnPlateau":
        return scheduler.step
    metrics = iter([1.0, 0.5, 0.7, 0.8, 0.4, 0.9])
    return lambda: scheduler.step(next(metrics))


def test_no_scheduler_of_torch_is_forgotten() -> None:
    public = {name for name in lrs.__all__ if inspect.isclass(getattr(lrs, name))}
    assert public - {"LRScheduler"} | {"SWALR"} == set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(("kind", "which"), [("SGD", "equal"), ("Adam", "equal"), ("Adam", "each")])
def test_schedules_equal_those_of_solo_optimizers(kind: str, which: str, name: str) -> None:
    own = SCHEDULERS[name][1]
    # One schedule for all if the rates are; else whatever this scheduler can give each member.
    given = own if which == "each" else row(own, 1)
    ens, ours, solo, theirs = pair(KINDS[kind], which, make_models("mlp"))
    data = make_data("mlp", STEPS - 1)
    train_ensemble(ens, ours, data, after_step=schedule(name, ours, given))
    steps = [schedule(name, o, row(given, i)) for i, o in enumerate(theirs)]
    train_solo(solo, theirs, data, after_step=lambda: [step() for step in steps])
    assert_trained_alike(ens, ours, solo, theirs)
    rates = [group["lr"] for group in ours.param_groups]
    assert rates == pytest.approx([o.param_groups[0]["lr"] for o in theirs][: len(rates)])
    assert len(rates) == (N if which == "each" else 1)


def test_groups_are_changed_by_hand() -> None:
    ens, ours, solo, theirs = pair(KINDS["AdamW"], "each", make_models("mlp"))
    data = make_data("mlp", 4)
    train_ensemble(ens, ours, data[:2])
    train_solo(solo, theirs, data[:2])
    for group in (ours.param_groups[1], theirs[1].param_groups[0]):
        group["lr"] *= 0.5
        group["betas"] = (0.7, 0.8)
    for group in (ours.param_groups[2], theirs[2].param_groups[0]):
        group["lr"] = torch.tensor(0.03, dtype=torch.float64)
    train_ensemble(ens, ours, data[2:3])
    train_solo(solo, theirs, data[2:3])
    for group in (ours.param_groups[2], theirs[2].param_groups[0]):
        group["lr"].mul_(2)
    train_ensemble(ens, ours, data[3:])
    train_solo(solo, theirs, data[3:])
    assert_trained_alike(ens, ours, solo, theirs)


def test_a_list_that_is_changed_in_place_is_noticed() -> None:
    ens, ours, solo, theirs = pair(KINDS["AdamW"], "each", make_models("mlp"))
    data = make_data("mlp", 4)
    betas = [0.7, 0.8]
    for group in (ours.param_groups[1], theirs[1].param_groups[0]):
        group["betas"] = betas
    for x in data:
        betas[0] /= 2
        train_ensemble(ens, ours, [x])
        train_solo(solo, theirs, [x])
    assert_trained_alike(ens, ours, solo, theirs)


@pytest.mark.parametrize("kind", ["SGD", "RMSprop"])
@pytest.mark.parametrize("which", ["equal", "each"])
def test_a_momentum_that_pauses_keeps_its_buffer(kind: str, which: str) -> None:
    ens, ours, solo, theirs = pair(KINDS[kind], which, make_models("mlp"))
    data = make_data("mlp", 6)
    mine = ours.param_groups[0]
    for k, momentum in enumerate((0.9, 0.0, 0.7)):
        for group in (mine, *(o.param_groups[0] for o in theirs[: N if which == "equal" else 1])):
            group.update(momentum=momentum, **({"nesterov": False} if kind == "SGD" else {}))
        train_ensemble(ens, ours, data[2 * k : 2 * k + 2])
        train_solo(solo, theirs, data[2 * k : 2 * k + 2])
        assert_trained_alike(ens, ours, solo, theirs)
