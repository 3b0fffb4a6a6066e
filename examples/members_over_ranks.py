"""Members over processes: a training loop, its evaluation, and the answer of all members.

    torchrun --nproc-per-node 2 examples/members_over_ranks.py
    torchrun --nproc-per-node 4 examples/members_over_ranks.py 2

With 2 behind it each block of members has two replicas, which share out the minibatch.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from unisono import Evaluation, combine, distributed, evaluate, member_losses, optim

MEMBERS, STEPS, BATCH_SIZE = 8, 30, 64
RATES = torch.logspace(-3, -1.5, MEMBERS).tolist()


def make_model() -> nn.Module:
    """A network of two layers."""
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))


def load() -> tuple[Tensor, Tensor]:
    """1,000 points in three classes, the same on every rank."""
    x = torch.randn(1000, 20, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


def train(mesh: DeviceMesh) -> tuple[Evaluation, Tensor]:
    """Train, and ask all members together; every rank gets the same answers."""
    x, y = load()
    part = distributed.build(make_model, MEMBERS, mesh)  # this rank's members
    block = part.block  # their place among all
    model = distributed.Synchronised(part)  # their replicas have the same gradients
    optimizer = optim.Adam(part, lr=RATES[block.slice])
    order = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        rows = torch.randperm(800, generator=order)[:BATCH_SIZE]  # the same on every rank
        rows = rows.chunk(block.num_replicas)[block.replica]  # this replica's part
        member_losses(F.cross_entropy, model(x[rows]), y[rows]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = evaluate(part, (x[800:], y[800:]), task="classification", mesh=mesh)
    with torch.no_grad():
        return found, combine.probabilities(part.eval()(x[800:]), mesh=mesh)


def main() -> None:
    """Train on the ranks that torchrun started, and print what came of it on one of them."""
    mesh = distributed.make_mesh(data=int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    found, _ = train(mesh)
    if dist.get_rank() == 0:
        print(found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
