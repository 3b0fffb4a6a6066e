"""Each refusal in full: the call, what is wrong, and what to write instead."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from solo_training import (
    KINDS,
    N,
    SharedBackbone,
    everything,
    make_data,
    make_models,
    train_ensemble,
)
from torch import nn

from unisono import Ensemble, optim
from unisono.errors import CheckpointError


@pytest.fixture
def ens() -> Ensemble:
    return Ensemble(make_models("mlp"))


def says(error: type[Exception], text: str) -> Any:
    """The error is raised with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


LEAST = "lr is at least 0"
DAMPED = "nesterov=True needs a momentum and no dampening; got momentum"
DIFFERENT = "indices are different members, at least one; got"
BETAS = "betas is a pair of numbers"
TOO_LOW = "at least 0; got -1.0"
BETWEEN = "of at least 0 and less than 1; got (0.9, 1.0)"
PAIRS = "[(0.9, 0.99), (0.9, 0.99)]"
NUMBERS = "a number, or 3 numbers, one per member"
WRONG_VALUES: list[tuple[type, dict[str, Any], str]] = [
    (optim.SGD, {"lr": -1}, "SGD: lr is at least 0; got -1.0"),
    (optim.SGD, {"lr": float("nan")}, "SGD: lr is at least 0; got nan"),
    (
        optim.SGD,
        {"lr": [0.1, -0.2, -3]},
        "SGD: lr is at least 0, but lr[1] is -0.2; lr is at least 0, but lr[2] is -3.0",
    ),
    (optim.SGD, {"lr": [0.1, 0.2]}, f"SGD: lr is {NUMBERS}; got [0.1, 0.2] (these are 2)"),
    (optim.SGD, {"lr": "0.1"}, f"SGD: lr is {NUMBERS}; got '0.1'"),
    (optim.SGD, {"lr": [0.1, None, 0.2]}, f"SGD: lr is {NUMBERS}; got [0.1, None, 0.2]"),
    (optim.SGD, {"lr": []}, f"SGD: lr is {NUMBERS}; got []"),
    (optim.SGD, {"lr": True}, f"SGD: lr is {NUMBERS}; got True"),
    (optim.SGD, {"momentum": -1}, "SGD: momentum is at least 0; got -1.0"),
    (optim.SGD, {"weight_decay": -1}, "SGD: weight_decay is at least 0; got -1.0"),
    (
        optim.SGD,
        {"nesterov": 1},
        "SGD: nesterov is True or False, or 3 of these, one per member; got 1",
    ),
    (
        optim.SGD,
        {"nesterov": True},
        f"SGD: {DAMPED}=0.0, dampening=0.0",
    ),
    (
        optim.SGD,
        {"nesterov": [False, True, True], "momentum": 0.9, "dampening": [0.1, 0.2, 0]},
        f"SGD: member 1: {DAMPED}=0.9, dampening=0.2",
    ),
    (
        optim.Adam,
        {"betas": (0.9, 1.0), "eps": -1, "lr": [1]},
        f"Adam: lr is {NUMBERS}; got [1] (these are 1); {BETAS} {BETWEEN}; eps is {TOO_LOW}",
    ),
    (
        optim.Adam,
        {"betas": [(0.9, 0.99), (0.9, 0.99)]},
        f"Adam: {BETAS}, or 3 pairs, one per member; got {PAIRS} (these are 2)",
    ),
    (
        optim.Adam,
        {"betas": 0.9},
        "Adam: betas is a pair of numbers, or 3 pairs, one per member; got 0.9",
    ),
    (optim.AdamW, {"weight_decay": -1}, "AdamW: weight_decay is at least 0; got -1.0"),
    (optim.RMSprop, {"alpha": -1}, "RMSprop: alpha is at least 0; got -1.0"),
    (optim.RMSprop, {"momentum": -1}, "RMSprop: momentum is at least 0; got -1.0"),
]


@pytest.mark.parametrize(("make", "values", "text"), WRONG_VALUES)
def test_wrong_values(ens: Ensemble, make: Any, values: dict[str, Any], text: str) -> None:
    with says(ValueError, text):
        make(ens, **values)
    if len(values) == 1:
        group = {"params": list(ens.parameters()), **values}
        with says(ValueError, text):
            make(ens, params=[group])


REFUSED_BY_TORCH = {
    "SGD": [{"lr": -1.0}, {"momentum": -1.0}, {"weight_decay": -1.0}, {"nesterov": True}],
    "Adam": [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}],
    "AdamW": [{"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}, {"betas": (-0.1, 0.9)}],
    "RMSprop": [{n: -1.0} for n in ("lr", "eps", "alpha", "momentum", "weight_decay")],
}


@pytest.mark.parametrize("name", REFUSED_BY_TORCH)
def test_what_the_namesake_refuses_is_refused(ens: Ensemble, name: str) -> None:
    for values in REFUSED_BY_TORCH[name]:
        with pytest.raises(ValueError, match=r"Invalid|Nesterov"):
            KINDS[name].torchs(ens.parameters(), **values)
        with pytest.raises(ValueError, match=rf"^{name}: {next(iter(values))}"):
            KINDS[name].ours(ens, **values)
        each = {key: [KINDS[name].each[key][0]] * 2 + [bad] for key, bad in values.items()}
        with pytest.raises(ValueError, match=r"\[2\] is|member 2: "):
            KINDS[name].ours(ens, **each)


def test_the_first_argument(ens: Ensemble) -> None:
    text = (
        "Adam: the first argument is an Ensemble; got generator; write Adam(ens, lr=...), and"
        " params= if it is to train some parameters only"
    )
    with says(TypeError, text):
        optim.Adam(ens.parameters())


def test_parameters_of_others(ens: Ensemble) -> None:
    text = (
        "SGD: not a parameter of this ensemble: params[0] of shape (6, 4), params[2] of shape"
        " (2,); take them from ens.parameters() or ens.members, and anything else to an optimizer"
        " of torch.optim"
    )
    other = nn.Parameter(torch.ones(2))
    first = next(ens[0].parameters())
    with says(ValueError, text):
        optim.SGD(ens, params=[first, ens.members.get_parameter("0.weight"), other])


def test_kinds_of_params(ens: Ensemble) -> None:
    weight = ens.members.get_parameter("0.weight")
    with says(TypeError, "SGD: params are tensors, or pairs of a name and a tensor; got ['str']"):
        optim.SGD(ens, params=["0.weight"])
    with says(TypeError, "SGD: params are in an order that stays, such as a list; got a set"):
        optim.SGD(ens, params=[{"params": {weight}}])
    with says(ValueError, "SGD: either all params have names or none; got names for ['a']"):
        optim.SGD(ens, params=[("a", weight), ens.members.get_parameter("2.weight")])
    with says(TypeError, "SGD: a param group is a dictionary with \"params\"; got {'lr': 0.1}"):
        optim.SGD(ens, params=[{"lr": 0.1}])
    optimizer = optim.SGD(ens, lr=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"^some parameters appear in more than one"):
        optimizer.add_param_group({"params": [weight]})
    assert len(optimizer.param_groups) == N
    with pytest.raises(ValueError, match=r"^optimizer got an empty parameter list$"):
        optim.SGD(ens, params=[])


def test_shared_parameters_take_one_value_and_the_message_can_be_pasted() -> None:
    backbone = nn.Sequential(nn.Linear(4, 6))
    ens = Ensemble([SharedBackbone(backbone) for _ in range(N)], shared="backbone.*")
    text = (
        "Adam: lr, betas is given per member, but all 3 members share `backbone.0.weight`,"
        " `backbone.0.bias`, which takes one value; put it into a group of its own:\n"
        "    own = [p for name, p in ens.members.named_parameters() if name not in ens.shared]\n"
        "    shared = [ens.members.backbone[0].weight, ens.members.backbone[0].bias]\n"
        '    Adam(ens, lr=[...], betas=[...], params=[{"params": own}, {"params": shared,'
        ' "lr": 0.1, "betas": (0.5, 0.6)}])'
    )
    given = {"lr": [0.1, 0.2, 0.3], "betas": [(0.5, 0.6), (0.7, 0.8), (0.8, 0.9)]}
    with says(ValueError, text) as caught:
        optim.Adam(ens, **given)
    code = str(caught.value).split(":\n", 1)[1].replace("    ", "")
    code = code.replace("lr=[...], betas=[...]", "**given").replace("Adam(", "made = optim.Adam(")
    names = {"ens": ens, "optim": optim, "given": given}
    exec(code, names)
    assert [group["lr"] for group in names["made"].param_groups] == [0.1, 0.2, 0.3, 0.1]


def test_a_frozen_shared_backbone_needs_no_group() -> None:
    backbone = nn.Linear(4, 6).requires_grad_(False)
    ens = Ensemble([SharedBackbone(backbone) for _ in range(N)], shared="backbone.*")
    listed = optim.Adam(ens, lr=[0.1, 0.2, 0.3]).param_groups[0]["params"]
    assert list(map(id, listed)) == list(map(id, ens.members.head.parameters()))
    assert len(optim.Adam(ens, lr=0.1).param_groups[0]["params"]) == 4  # as torch takes them


@pytest.mark.parametrize(
    "mask", [[True, False], [1, 0, 1], True, torch.ones(3), torch.ones(1, 3, dtype=torch.bool)]
)
def test_masks(ens: Ensemble, mask: Any) -> None:
    text = (
        f"SGD.step: active is a mask of 3 booleans, one per member; got {mask!r}; write"
        f" active=[i in members for i in range(3)]"
    )
    with says(ValueError, text):
        optim.SGD(ens).step(active=mask)


def test_sparse_gradients() -> None:
    ens = Ensemble([nn.Embedding(4, 2) for _ in range(N)])
    ens.members.weight.grad = torch.zeros(N, 4, 2).to_sparse()
    text = (
        "Adam.step: the gradient of `weight` is sparse, and Adam needs dense ones; write"
        " nn.Embedding(..., sparse=False)"
    )
    with says(RuntimeError, text):
        optim.Adam(ens).step()


def test_no_step_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch, ens: Ensemble) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    text = (
        "SGD.step: a CUDA graph would repeat this step's hyperparameters and bias corrections,"
        " which are numbers on the host; capture forward and backward, and step outside of the"
        " graph"
    )
    with says(RuntimeError, text):
        optim.SGD(ens).step()


def trained(n: int, **values: Any) -> tuple[Ensemble, Any]:
    ens = Ensemble(make_models("mlp", n))
    optimizer = optim.Adam(ens, **values)
    train_ensemble(ens, optimizer, make_data("mlp", 1, n))
    return ens, optimizer


def refuse(mine: tuple[Ensemble, Any], state: dict[str, Any], text: str) -> None:
    before = everything(*mine)
    groups = [dict(group) for group in mine[1].param_groups]
    with says(CheckpointError, f"Adam.load_state_dict: {text}"):
        mine[1].load_state_dict(state)
    after = everything(*mine)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [group["lr"] for group in mine[1].param_groups] == [group["lr"] for group in groups]


def test_states_of_other_ensembles() -> None:
    each, equal = trained(3, lr=[0.1, 0.2, 0.3]), trained(3)
    refuse(
        each,
        trained(4, lr=[0.1] * 4)[1].state_dict(),
        "the state has groups of 4 members, this optimizer is for 3; load it for an ensemble of 4,"
        " and take some of them with optimizer.select(big[indices], indices)",
    )
    refuse(
        equal,
        each[1].state_dict(),
        "the state has 0 groups for all members and 3 for single ones, this optimizer has 1 groups"
        " for all members and 0 for single ones; make it with the same params=, and one value per"
        " member where that one had them",
    )
    other = trained(4)[1].state_dict()
    shapes = [("0.weight", "6, 4"), ("0.bias", "6,"), ("2.weight", "2, 6"), ("2.bias", "2,")]
    problems = []
    for name, shape in shapes:
        member = shape.removesuffix(",")
        problems += [f"`{name}`: step has shape (4,), the parameter has (3, {member})"]
        problems += [
            f"`{name}`: {key} has shape (4, {member}), the parameter has (3, {member})"
            for key in ("exp_avg", "exp_avg_sq")
        ]
    refuse(equal, other, "; ".join([*problems, "load it for an ensemble of as many members"]))
    ens = Ensemble(make_models("mlp"))
    some = optim.Adam(ens, params=list(ens.parameters())[:2])
    missing = "betas, amsgrad, decoupled_weight_decay"
    text = f"the state has no {missing}; it is of another optimizer than Adam"
    refuse(equal, optim.RMSprop(ens).state_dict(), text)
    refuse(equal, some.state_dict(), "group 0 of the state has 2 parameters, here it has 4")


def test_parts_that_do_not_fit(ens: Ensemble) -> None:
    optimizer = optim.SGD(ens, lr=0.1, momentum=0.9)
    with says(ValueError, f"SGD.select: {DIFFERENT} [1, 1]"):
        optimizer.select(ens[[1, 1]], [1, 1])
    with says(ValueError, f"SGD.select: {DIFFERENT} []"):
        optimizer.select(ens, [])
    text = "the ensemble of members [0, 2] has 2 of them, this one has 3; pass big[[0, 2]]"
    with says(ValueError, f"SGD.select: {text}"):
        optimizer.select(ens, [0, 2])
    with pytest.raises(IndexError, match="there are 3 members, 0 to 2"):
        optimizer.select(ens, [0, 3])
    strange = Ensemble([nn.Linear(2, 2) for _ in range(2)])
    names = "`0.bias`, `0.weight`, `2.bias`, `2.weight`"
    missing = f"the ensemble has no parameter {names}; pass big[indices]"
    with says(ValueError, f"SGD.select: {missing}"):
        optimizer.select(strange, [0, 1])
    part = optimizer.select(ens[[0, 2]], [0, 2])
    for name, call in (
        ("write_back", lambda: optimizer.write_back(part, [1])),
        ("take", lambda: part.take(optimizer, [1])),
        ("take_hyperparameters", lambda: part.take_hyperparameters(optimizer, [1])),
    ):
        text = "the ensemble of members [1] has 1 of them, this one has 2; pass big[[1]]"
        with says(ValueError, f"SGD.{name}: {text}"):
            call()
    with says(TypeError, "SGD.write_back: both are SGD optimizers; got Adam"):
        optimizer.write_back(optim.Adam(ens[[0, 2]]), [0, 2])
    small = ens[[0, 2]]
    fewer = optim.SGD(small, params=list(small.parameters())[1:])
    with says(ValueError, "SGD.write_back: only one of the optimizers trains `0.weight`"):
        optimizer.write_back(fewer, [0, 2])
    with pytest.raises(ValueError, match=r"src and dst are as many members"):
        optimizer.copy_members([0, 1], [2])


def test_every_hyperparameter_is_parsed() -> None:
    for kind in KINDS.values():
        ens = Ensemble(make_models("mlp"))
        for spec in kind.ours.method.hyperparameters:
            if spec.name in kind.each:
                with pytest.raises(
                    ValueError, match=rf"^{kind.ours.__name__}: {spec.name} is .* got 'x'$"
                ):
                    kind.ours(ens, **{spec.name: "x"})
