"""One epoch of N networks over the same data, each in its own order of the rows.

The loop and joblib are what people do today: N solo trainings, one after another or spread over
two processes. joblib's processes are started before the timing; what they are sent and send back
(model, optimizer state, losses) is part of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.contenders import Contender, NotApplicableError
from unisono import Ensemble, fit, optim, sampling

LOOP, JOBLIB, OWN_LOOP, FIT = "loop", "joblib, 2 processes", "unisono, own loop", "unisono.fit"
LR = 1e-3


@dataclass(frozen=True)
class EpochCase:
    """Networks and the data that they are trained on.

    Args:
        name: As it is shown.
        make: Makes one model.
        members: Number of models.
        inputs: Shape of one row.
        rows: Number of rows.
        batch: Rows of a minibatch.
    """

    name: str
    make: Callable[[], nn.Module]
    members: int
    inputs: tuple[int, ...]
    rows: int = 4000
    batch: int = 64

    def data(self) -> tuple[Tensor, Tensor]:
        """Random rows with one of ten classes."""
        return torch.randn(self.rows, *self.inputs), torch.randint(10, (self.rows,))

    def order(self) -> Tensor:
        """(N, rows): the order of every member, as `unisono.fit` has it in its first epoch."""
        kind = sampling.shuffled()
        members = range(self.members)
        found = kind.order(self.rows, members, 0, seed=0, num_members=self.members)
        return torch.from_numpy(found.copy())

    @property
    def steps(self) -> int:
        """Minibatches of an epoch."""
        return -(-self.rows // self.batch)


def train_alone(
    model: nn.Module, state: Any, data: tuple[Tensor, Tensor], order: Tensor, steps: int
) -> tuple[dict[str, Tensor], Any]:
    """One epoch of one model; its weights and the state of its optimizer."""
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    if state is not None:
        optimizer.load_state_dict(state)
    for rows in order.tensor_split(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return {n: p.detach() for n, p in model.named_parameters()}, optimizer.state_dict()


def _alone_in_process(*args: Any) -> Any:
    torch.set_num_threads(1)  # two processes share two cores
    return train_alone(*args)


def loop(case: EpochCase, models: list[nn.Module], data: tuple[Tensor, Tensor]) -> Contender:
    """N solo trainings, one after another."""
    models = [copy.deepcopy(model) for model in models]
    order = case.order()
    states: list[Any] = [None] * case.members
    weights: list[dict[str, Tensor]] = [{}] * case.members

    def epoch() -> Tensor:
        for i, model in enumerate(models):
            weights[i], states[i] = train_alone(model, states[i], data, order[i], case.steps)
        return torch.zeros(case.members)

    return Contender(epoch, gradients=lambda: _stacked(weights))


def joblib(case: EpochCase, models: list[nn.Module], data: tuple[Tensor, Tensor]) -> Contender:
    """N solo trainings in two processes of one thread each."""
    try:
        from joblib import Parallel, delayed
    except ImportError as error:
        raise NotApplicableError("not installed") from error
    models = [copy.deepcopy(model) for model in models]
    order = case.order()
    pool = Parallel(n_jobs=2)
    pool(delayed(torch.zeros)(1) for _ in range(4))  # starts them
    found: list[Any] = [({}, None)] * case.members

    def epoch() -> Tensor:
        found[:] = pool(
            delayed(_alone_in_process)(model, state, data, order[i], case.steps)
            for i, (model, (_, state)) in enumerate(zip(models, found, strict=True))
        )
        for model, (weights, _) in zip(models, found, strict=True):
            model.load_state_dict(weights, strict=False)
        return torch.zeros(case.members)

    return Contender(epoch, gradients=lambda: _stacked([weights for weights, _ in found]))


def own_loop(case: EpochCase, models: list[nn.Module], data: tuple[Tensor, Tensor]) -> Contender:
    """The loop of the README."""
    from unisono import member_losses, per_member

    x, y = data
    ens = Ensemble(models)
    optimizer = optim.Adam(ens, lr=LR)
    order = case.order()

    def epoch() -> Tensor:
        for rows in order.tensor_split(case.steps, dim=1):
            outputs = ens(per_member(x[rows]))
            member_losses(F.cross_entropy, outputs, per_member(y[rows])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.zeros(case.members)

    return Contender(epoch, gradients=lambda: _parameters(ens))


def by_fit(case: EpochCase, models: list[nn.Module], data: tuple[Tensor, Tensor]) -> Contender:
    """`unisono.fit`, one epoch a call."""
    ens = Ensemble(models)
    optimizer = optim.Adam(ens, lr=LR)

    def epoch() -> Tensor:
        fit(
            ens,
            data,
            loss=F.cross_entropy,
            optimizer=optimizer,
            epochs=1,
            batch_size=case.batch,
            sampling="shuffled",
            progress=False,
        )
        return torch.zeros(case.members)

    return Contender(epoch, gradients=lambda: _parameters(ens))


def _parameters(ens: Ensemble) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in ens.members.named_parameters()}


def _stacked(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([own[name] for own in weights]) for name in weights[0]}
