"""Training without an ensemble: N modules, N optimizers of torch; the truth for `unisono.optim`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cases import TiedAutoencoder
from oracles import assert_state_equal, copies
from unisono import Ensemble, optim, per_member

N = 3


class SharedBackbone(nn.Module):
    """A head of its own on a backbone that all members share."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).tanh())


class CNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def transformer() -> nn.Module:
    # Without biases: the gradient of the keys' is zero but for rounding, which Adam would enlarge.
    return nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, bias=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (5, 4)),
    "cnn": (CNN, (4, 2, 6, 6)),
    "transformer": (transformer, (2, 3, 8)),
    "tied": (TiedAutoencoder, (5, 6)),
}


@dataclass(frozen=True)
class Kind:
    """An optimizer, with values for all members and with one per member for everything.

    Args:
        ours: Of `unisono.optim`.
        torchs: Its namesake.
        equal: Values for all, the less usual ones.
        each: For every hyperparameter one value per member.
    """

    ours: type[optim.MemberOptimizer]
    torchs: type[torch.optim.Optimizer]
    equal: dict[str, Any]
    each: dict[str, list[Any]]

    def values(self, which: str) -> dict[str, Any]:
        return {"default": {"lr": 0.05}, "equal": self.equal, "each": self.each}[which]

    def solo(self, which: str, member: int) -> dict[str, Any]:
        return row(self.values(which), member)


def row(values: dict[str, Any], member: int) -> dict[str, Any]:
    """The values of one member."""
    return {k: v[member] if isinstance(v, list) else v for k, v in values.items()}


_RATES = {"lr": [0.05, 0.02, 0.01], "weight_decay": [0.0, 0.1, 0.02]}
_ADAM = {
    **_RATES,
    "betas": [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)],
    "eps": [1e-8, 1e-3, 1e-2],
    "amsgrad": [True, False, True],
    "maximize": [False, True, False],
}
KINDS = {
    "SGD": Kind(
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "maximize": True},
        {
            **_RATES,
            "momentum": [0.9, 0.0, 0.5],
            "dampening": [0.0, 0.2, 0.3],
            "nesterov": [True, False, False],
            "maximize": [False, True, False],
        },
    ),
    "Adam": Kind(
        optim.Adam,
        torch.optim.Adam,
        {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1, "amsgrad": True, "maximize": True},
        {**_ADAM, "decoupled_weight_decay": [True, True, False]},
    ),
    "AdamW": Kind(
        optim.AdamW,
        torch.optim.AdamW,
        {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.3, "eps": 1e-3},
        _ADAM,
    ),
    "RMSprop": Kind(
        optim.RMSprop,
        torch.optim.RMSprop,
        {"lr": 0.02, "alpha": 0.9, "weight_decay": 0.1, "momentum": 0.5, "centered": True},
        {
            "lr": [0.02, 0.01, 0.005],
            "weight_decay": [0.0, 0.1, 0.02],
            "alpha": [0.9, 0.99, 0.5],
            "eps": [1e-8, 1e-3, 1e-2],
            "momentum": [0.9, 0.0, 0.5],
            "centered": [True, False, False],
            "maximize": [False, True, False],
        },
    ),
}


def make_models(name: str, n: int = N, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    return [MODELS[name][0]().to(dtype) for _ in range(n)]


def make_data(
    name: str, steps: int, n: int = N, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """For each step the members' own minibatches."""
    return [torch.randn(n, *MODELS[name][1], dtype=dtype) for _ in range(steps)]


def member_losses(outputs: Tensor) -> Tensor:
    """One loss per member, to which all its outputs contribute."""
    weights = torch.linspace(0.5, 1.5, outputs[0].numel()).to(outputs).view(outputs.shape[1:])
    return (weights * (outputs - 0.3).square()).flatten(1).mean(1)


def train_ensemble(
    ens: Ensemble,
    optimizer: torch.optim.Optimizer,
    data: Sequence[Tensor],
    after_step: Callable[[], object] = lambda: None,
    **step: Any,
) -> None:
    for x in data:
        optimizer.zero_grad()
        member_losses(ens(per_member(x))).sum().backward()
        optimizer.step(**step)
        after_step()


def train_solo(
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    data: Sequence[Tensor],
    after_step: Callable[[], object] = lambda: None,
) -> None:
    for x in data:
        for optimizer in optimizers:
            optimizer.zero_grad()
        for i, model in enumerate(models):
            member_losses(model(x[i])[None]).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        after_step()


def pair(
    kind: Kind, which: str, models: Sequence[nn.Module]
) -> tuple[Ensemble, Any, list[nn.Module], list[torch.optim.Optimizer]]:
    """The same models twice: as an ensemble with its optimizer, and by themselves with theirs."""
    ens = Ensemble(models, strategy="fused")
    ours = kind.ours(ens, **kind.values(which))
    solo = copies(models)
    theirs = [kind.torchs(m.parameters(), **kind.solo(which, i)) for i, m in enumerate(solo)]
    return ens, ours, solo, theirs


def assert_optimizer_equal(
    ens: Ensemble,
    ours: torch.optim.Optimizer,
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    **tolerance: float,
) -> None:
    """The state of every member, by the name of the parameter and the key."""
    for name, p in ens.members.named_parameters():
        got = ours.state.get(p, {})
        for i, (model, theirs) in enumerate(zip(models, optimizers, strict=True)):
            want = theirs.state.get(model.get_parameter(name), {})
            want = {k: v for k, v in want.items() if v is not None}
            assert want.keys() <= got.keys(), f"{name}: {want.keys()} are not in {got.keys()}"
            for key, value in got.items():
                if key == "step" and key not in want:
                    continue  # torch's SGD doesn't count
                expected = want.get(key, torch.zeros_like(value[i]))
                torch.testing.assert_close(
                    value[i],
                    expected.to(value.dtype),
                    msg=lambda m, n=name, k=key, i=i: f"member {i}, {k} of {n}: {m}",
                    **tolerance,
                )


def assert_trained_alike(
    ens: Ensemble,
    ours: torch.optim.Optimizer,
    models: Sequence[nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
    **tolerance: float,
) -> None:
    """Parameters, buffers and the state of the optimizers."""
    assert_state_equal(ens, models, **tolerance)
    assert_optimizer_equal(ens, ours, models, optimizers, **tolerance)


def everything(ens: Ensemble, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all tensors, to be compared bitwise."""
    found = {f"ens.{name}": t.detach().clone() for name, t in ens.state_dict().items()}
    for name, p in ens.members.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            found[f"{key} of {name}"] = value.detach().clone()
    return found


def deep_pair(ens: Ensemble, optimizer: Any) -> tuple[Ensemble, Any]:
    return copy.deepcopy((ens, optimizer))
