"""A process of the test of DistributedDataParallel: trains on its half of the batch.

Called as ``python distributed_training.py RANK FILE``; prints what it ended with as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unisono import Ensemble

WORLD = 2


def build() -> Ensemble:
    return Ensemble.build(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), 3, seed=1
    )


def batch() -> torch.Tensor:
    return torch.linspace(-1, 1, 24, dtype=torch.float64).view(8, 3)


def train(model: nn.Module, x: torch.Tensor) -> list[float]:
    """Three steps on the mean over the batch; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    rank, file = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    ens = build()
    losses = train(DistributedDataParallel(ens), batch().chunk(WORLD)[rank])
    state = {name: tensor.tolist() for name, tensor in ens.state_dict().items()}
    print(json.dumps({"losses": losses, "state": state}), flush=True)  # noqa: T201
    torch.distributed.barrier()
    # Without taking gloo down: when the other process has gone first, its threads may abort this
    # one ("terminate called without an active exception"), which says nothing of the training.
    os._exit(0)


if __name__ == "__main__":
    main()
