"""What one member would do without the others, written out: the oracle of `fit`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from unisono.training.sampling import as_sampling


@dataclass
class Solo:
    """One model's own training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list = field(default_factory=list)
    validation: list = field(default_factory=list)
    best: dict | None = None
    best_epoch: int = -1
    stopped: str = ""


def minibatches(x, y, *, sampling, member, num_members, epoch, seed, batch_size):
    kind = as_sampling(sampling)
    order = kind.order(len(x), [member], epoch, seed=seed, num_members=num_members)[0].copy()
    count = -(-len(order) // batch_size)
    for rows in np.array_split(order, count):
        yield x[torch.from_numpy(rows)], y[torch.from_numpy(rows)]


def train_alone(
    models,
    make_optimizer,
    data,
    loss,
    *,
    epochs,
    sampling="shared",
    batch_size=64,
    seed=0,
    validation=None,
    patience=None,
    min_delta=0.0,
    max_norm=None,
    accumulate=1,
    make_scheduler=None,
):
    """N trainings one after another; returns a `Solo` for each."""
    found = []
    for i, original in enumerate(models):
        model = copy.deepcopy(original)
        solo = Solo(model, make_optimizer(model.parameters(), i))
        scheduler = make_scheduler(solo.optimizer, i) if make_scheduler else None
        for epoch in range(epochs):
            if solo.stopped:
                break
            model.train()
            total, rows = 0.0, 0
            batches = list(
                minibatches(
                    *data,
                    sampling=sampling,
                    member=i,
                    num_members=len(models),
                    epoch=epoch,
                    seed=seed,
                    batch_size=batch_size,
                )
            )
            for start in range(0, len(batches), accumulate):
                group = batches[start : start + accumulate]
                solo.optimizer.zero_grad()
                for x, y in group:
                    value = loss(model(x), y)
                    (value / len(group)).backward()
                    total += value.item() * len(x)
                    rows += len(x)
                if max_norm is not None:
                    limit = max_norm if isinstance(max_norm, float) else max_norm[i]
                    nn.utils.clip_grad_norm_(model.parameters(), limit)
                solo.optimizer.step()
            solo.losses.append(total / rows)
            if validation is not None:
                model.eval()
                with torch.no_grad():
                    solo.validation.append(loss(model(validation[0]), validation[1]).item())
                before = np.inf if solo.best is None else solo.validation[solo.best_epoch]
                if solo.validation[-1] < before - min_delta:
                    solo.best, solo.best_epoch = copy.deepcopy(model.state_dict()), epoch
                elif patience is not None and epoch - solo.best_epoch >= patience:
                    solo.stopped = "patience"
            if scheduler is not None:
                scheduler.step()
        if patience is not None and solo.best is not None:
            model.load_state_dict(solo.best)
        found.append(solo)
    return found
