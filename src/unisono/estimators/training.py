"""Arrays of rows -> a trained ensemble, by `unisono.fit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.ensemble import Ensemble
from unisono.estimators.losses import Loss
from unisono.estimators.moments import Array
from unisono.estimators.rows import hold_out
from unisono.estimators.settings import Settings
from unisono.optim import AdamW, MemberOptimizer
from unisono.training.combined import Combine
from unisono.training.fit import fit
from unisono.training.history import History


@dataclass(frozen=True, eq=False)
class Data:
    """Rows to train on.

    Args:
        x: Features, in the dtype of the network.
        y: Targets as the loss takes them.
        weights: None for equal ones.

    Shape:
        - x: (B, F)
        - y: (B, *)
        - weights: (B)
    """

    x: Array
    y: Array
    weights: Array | None

    def part(self, rows: Array) -> tuple[Tensor, Any]:
        """Inputs and targets of some rows, as `fit` takes them."""
        y = torch.from_numpy(self.y[rows])
        x = torch.from_numpy(self.x[rows])
        if self.weights is None:
            return x, y
        return x, (y, torch.from_numpy(self.weights[rows]).to(x.dtype))


@dataclass(frozen=True)
class Task:
    """What members learn.

    Args:
        loss: Of one member.
        combine: Outputs of all members -> what the loss takes.
    """

    loss: Loss
    combine: Combine


def make_optimizer(ens: Ensemble, settings: Settings) -> MemberOptimizer:
    """AdamW with the rates of the settings.

    Args:
        ens: The ensemble.
        settings: Learning rate and weight decay.
    """
    rates, decay = settings.learning_rate, settings.weight_decay
    return AdamW(ens, lr=rates, weight_decay=decay)


def train(
    ens: Ensemble, data: Data, task: Task, settings: Settings, keys: Array | None, seed: int
) -> History:
    """Train until the last epoch, or each member until held-out rows get no better.

    Args:
        ens: The ensemble, trained in place.
        data: All rows.
        task: What to learn.
        settings: How long.
        keys: What the held-out rows are to have in the same shares; see `hold_out`.
        seed: Of the choice and the order of the rows.

    Returns:
        What `fit` returns.
    """
    train_rows = np.arange(len(data.x))
    validation = None
    if settings.patience is not None:
        fraction = settings.validation_fraction
        train_rows, held_out = hold_out(len(data.x), fraction, keys, seed)
        if len(held_out):
            validation = data.part(held_out)
    history = fit(
        ens,
        data.part(train_rows),
        loss=task.loss,
        optimizer=make_optimizer(ens, settings),
        epochs=settings.max_epochs,
        batch_size=settings.batch_size,
        sampling=settings.sampling,
        validation=validation,
        combine=task.combine,
        patience=None if validation is None else settings.patience,
        min_delta=settings.min_delta,
        seed=seed,
        progress=settings.verbose,
    )
    ens.eval()
    return history


def train_on(
    ens: Ensemble,
    optimizer: MemberOptimizer,
    data: Data,
    task: Task,
    settings: Settings,
    seed: int,
) -> History:
    """Go once through more rows, with an optimizer that goes on where it stands.

    Args:
        ens: The ensemble, trained in place.
        optimizer: Its optimizer.
        data: The rows.
        task: What to learn.
        settings: Batch size and sampling.
        seed: Of the order of the rows.

    Returns:
        What `fit` returns.
    """
    history = fit(
        ens,
        data.part(np.arange(len(data.x))),
        loss=task.loss,
        optimizer=optimizer,
        epochs=1,
        batch_size=settings.batch_size,
        sampling=settings.sampling,
        seed=seed,
        progress=settings.verbose,
    )
    ens.eval()
    return history


def mean_one(weights: Array | None) -> Array | None:
    """Weights of mean 1, so that they don't change the learning rate; None where all are equal.

    Args:
        weights: Positive weights.

    Shape:
        - weights, returns: (B)
    """
    if weights is None or (weights == weights[0]).all():
        return None
    found: Array = weights * (len(weights) / weights.sum())
    return found
