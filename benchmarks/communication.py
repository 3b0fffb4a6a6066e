"""What ranks send: bytes per training step and per answer, measured on real processes.

``torchrun --nproc-per-node 4 -m benchmarks.communication`` prints a table. Every number is asserted
to be the one of the formula beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from benchmarks.collective_bytes import CollectiveBytes
from benchmarks.scaling_model import OF_EPOCH
from unisono import Ensemble, combine, distributed, fit, member_losses, optim, uncertainty

N, B, C, FEATURES = 8, 64, 10, 784


def make_model() -> nn.Module:
    """A member."""
    return nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, C))


def numel(part: Ensemble, *, shared: bool) -> int:
    """Numbers among the parameters that members share, or that they own."""
    named = part.members.named_parameters()
    return sum(p.numel() for name, p in named if (name in part.shared) == shared)


def of_a_step(mesh: DeviceMesh, shared: str = "") -> tuple[int, int]:
    """Bytes of a training step, and how many they are to be."""
    part = distributed.build(make_model, N, mesh, shared=shared or (), strategy="fused")
    model = distributed.Synchronised(part)
    optimizer = optim.Adam(part, lr=1e-3)
    x, y = torch.randn(B, FEATURES), torch.randint(C, (B,))

    def step() -> None:
        member_losses(F.cross_entropy, model(x), y).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):  # DistributedDataParallel agrees on its buckets in the first ones
        step()
    assert part.block is not None
    own = numel(part, shared=False) if part.block.num_replicas > 1 else 0
    return bytes_of(step), 4 * (own + numel(part, shared=True))


def of_fit(mesh: DeviceMesh, steps: int, epochs: int = 1) -> int:
    """Bytes of a training by `fit`."""
    part = distributed.build(make_model, N, mesh, strategy="fused")
    rows = B * steps
    data = torch.zeros(rows, FEATURES), torch.zeros(rows, dtype=torch.long)
    optimizer = optim.Adam(part, lr=1e-3)

    def train() -> None:
        fit(
            part,
            data,
            loss=F.cross_entropy,
            optimizer=optimizer,
            epochs=epochs,
            batch_size=B,
            progress=False,
        )

    return bytes_of(train)


def of_a_step_of_fit(mesh: DeviceMesh) -> tuple[int, int]:
    """Bytes of a further step in an epoch, and how many they are to be: gradients, and flags."""
    part = distributed.build(make_model, N, mesh)
    flags = 8 * (3 + len(list(part.parameters())))
    assert part.block is not None
    wanted = 4 * numel(part, shared=False) + flags if part.block.num_replicas > 1 else 0
    return of_fit(mesh, steps=3) - of_fit(mesh, steps=2), wanted


def of_an_epoch(mesh: DeviceMesh) -> tuple[int, int]:
    """Bytes of a further epoch, in which nobody is asked for anything, and how many they are to be.

    Beside what there is of each member: the place of the rank, whether it failed, its rows.
    """
    found = (of_fit(mesh, 2, epochs=5) - of_fit(mesh, 2, epochs=1)) // 4
    return found, OF_EPOCH * -(-N // mesh.size()) + 3 * 8


def of_answers(mesh: DeviceMesh) -> dict[str, tuple[int, int]]:
    """Bytes of what all members say together, and how many they are to be."""
    block = distributed.build(make_model, N, mesh).block
    assert block is not None
    logits = torch.randn(block.size, B, C)
    most = -(-N // block.num_blocks)
    return {
        name: (bytes_of(lambda fn=fn: fn(logits)), wanted)
        for name, fn, wanted in [
            ("combine.mean", lambda y: combine.mean(y, mesh=mesh), 4 * (B * C + 1)),
            (
                "combine.probabilities",
                lambda y: combine.probabilities(y, mesh=mesh),
                4 * (B * C + 1),
            ),
            ("combine.vote", lambda y: combine.vote(y, mesh=mesh), 4 * B * C),
            (
                "uncertainty.classification",
                lambda y: uncertainty.classification(y, mesh=mesh),
                4 * (2 * B * C + 1 + 2 * (B + 1)),
            ),
            ("combine.median", lambda y: combine.median(y, mesh=mesh), 4 * most * B * C + 8),
        ]
    }


def bytes_of(call: Callable[[], Any]) -> int:
    """What this rank hands to collectives in a call."""
    with CollectiveBytes() as count:
        call()
    return count.total


def main() -> None:
    """Measure, compare with the formulas, print."""
    wide = distributed.make_mesh()
    rows = {"step, data=1": of_a_step(wide), "step, data=1, layer 0 shared": of_a_step(wide, "0.*")}
    rows["step of fit, data=1"] = of_a_step_of_fit(wide)
    if wide.size() % 2 == 0:
        replicated = distributed.make_mesh(data=2)
        rows["step, data=2"] = of_a_step(replicated)
        rows["step of fit, data=2"] = of_a_step_of_fit(replicated)
    rows["end of an epoch of fit"] = of_an_epoch(wide)
    rows |= of_answers(wide)
    for name, (found, wanted) in rows.items():
        assert found == wanted, f"{name}: {found} bytes, not {wanted}"
    if dist.get_rank() == 0:
        print(
            f"{wide.size()} ranks, N = {N}, B = {B}, C = {C}, float32, torch {torch.__version__}\n"
        )
        print("| what | bytes of a rank |\n|---|---|")
        for name, (found, _) in rows.items():
            print(f"| {name} | {found:,} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
