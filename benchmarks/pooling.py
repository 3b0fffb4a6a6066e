"""One pool in each of N members: the loop, `torch.vmap` and unisono.

Run from the root of the repository: ``python -m benchmarks.pooling``, on quiet cores. The images
are those of usual networks, with channels apart, as PyTorch's convolutions leave them. In training
the gradients of the inputs are computed. Outputs and gradients are compared with the loop's first.
"""

from __future__ import annotations

import argparse
from typing import Final, NamedTuple

import torch
from torch import nn

from benchmarks.contenders import LOOP, UNISONO, VMAP, Contender
from benchmarks.layers import layer_contender, table_head, timed_row
from benchmarks.predict import describe_run
from unisono import Ensemble, per_member

KINDS: Final = {"max": nn.MaxPool2d, "average": nn.AvgPool2d}


class Pool(NamedTuple):
    """A pool and what it sees."""

    members: int
    batch: int
    channels: int
    side: int
    kernel: int
    stride: int
    padding: int = 0

    @property
    def name(self) -> str:
        """As it is shown."""
        n, b, c, side, kernel, stride, _ = self
        return f"{n} x {kernel}x{kernel}, stride {stride}, B {b}, {c} x {side}x{side}"


POOLS: Final = (
    Pool(8, 2, 4, 8, 2, 2),
    Pool(8, 16, 16, 14, 2, 2),
    Pool(8, 32, 32, 28, 2, 2),
    Pool(8, 16, 64, 32, 2, 2),
    Pool(8, 16, 64, 16, 3, 2, 1),
    Pool(4, 4, 64, 112, 3, 2, 1),
    Pool(4, 8, 192, 28, 3, 1, 1),
    Pool(4, 8, 128, 28, 7, 7),
)


def main() -> None:
    """Compare, time, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pooling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=6, help="for the rounds of one row")
    options = parser.parse_args()
    print(f"{describe_run(options)}\n", flush=True)
    print(table_head("pool"), flush=True)
    for kind in KINDS:
        for pool in POOLS:
            for backward in (False, True):
                print(row(kind, pool, backward, options.rounds, options.seconds), flush=True)


def row(kind: str, pool: Pool, backward: bool, rounds: int, seconds: float) -> str:
    """A line of the table."""
    name, ready = f"{kind} {pool.name}", contenders(kind, pool, backward)
    return timed_row(name, backward, ready, rounds, seconds)


def contenders(kind: str, pool: Pool, backward: bool) -> dict[str, Contender]:
    """Three ways to run the members, with inputs of their own."""
    torch.manual_seed(0)
    n, batch, channels, side, kernel, stride, padding = pool
    models = [KINDS[kind](kernel, stride, padding) for _ in range(n)]
    # As a convolution of all members leaves them: the batch outermost.
    x = torch.randn(batch, n, channels, side, side).transpose(0, 1)
    own = [x[i].clone().requires_grad_(backward) for i in range(n)]
    theirs, ours = (x.clone().requires_grad_(backward) for _ in range(2))
    mapped = torch.vmap(models[0])
    ens = Ensemble(models, strategy="fused")
    pairs = list(zip(models, own, strict=True))
    return {
        LOOP: layer_contender(lambda: [model(x) for model, x in pairs], own, [], backward),
        VMAP: layer_contender(lambda: [mapped(theirs)], [theirs], [], backward),
        UNISONO: layer_contender(lambda: [ens(per_member(ours))], [ours], [], backward),
    }


if __name__ == "__main__":
    main()
