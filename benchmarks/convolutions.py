"""One convolution in each of N members: the loop, `torch.vmap` (groups of one), and unisono.

Run from the root of the repository: ``python -m benchmarks.convolutions``, on quiet cores. Layers
are those of the networks in `benchmarks.predict` where unisono goes a way of its own: filters of
one position, and large weights that see few positions. In training the gradients of weights and
inputs are computed anew in each step. Outputs and gradients are compared with the loop's first.
"""

from __future__ import annotations

import argparse
import functools
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.contenders import LOOP, UNISONO, VMAP, Contender
from benchmarks.layers import layer_contender, table_head, timed_row
from benchmarks.predict import describe_run
from unisono import Ensemble, per_member


class Layer(NamedTuple):
    """A convolution and what it sees."""

    members: int
    batch: int
    channels: int
    filters: int
    side: int
    kernel: int = 3
    stride: int = 1

    @property
    def name(self) -> str:
        """As it is shown."""
        n, b, c, o, side, kernel, stride = self
        step = f", stride {stride}" if stride > 1 else ""
        return f"{n} x {c} -> {o}, {kernel}x{kernel}{step}, B {b}, {side}x{side}"


LAYERS: Final = (
    Layer(4, 8, 16, 16, 16, kernel=1),
    Layer(4, 8, 24, 88, 8, kernel=1),
    Layer(4, 8, 40, 240, 4, kernel=1),
    Layer(4, 8, 240, 40, 4, kernel=1),
    Layer(4, 8, 96, 576, 2, kernel=1),
    Layer(4, 4, 256, 512, 7, kernel=1),
    Layer(8, 16, 128, 256, 4, stride=2),
    Layer(8, 16, 256, 512, 2, stride=2),
    Layer(8, 16, 512, 512, 1),
    Layer(4, 2, 512, 512, 4),
    Layer(4, 2, 1024, 512, 4),
    Layer(4, 2, 512, 1024, 2),
    Layer(4, 2, 1024, 1024, 2),
)


def main() -> None:
    """Compare, time, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convolutions", description=__doc__)
    parser.add_argument("--only", default="", help="a part of the names of the layers")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=10, help="for the rounds of one layer")
    options = parser.parse_args()
    print(f"{describe_run(options)}\n", flush=True)
    print(table_head("layer"), flush=True)
    for layer in LAYERS:
        if options.only in layer.name:
            for backward in (False, True):
                print(row(layer, backward, options.rounds, options.seconds), flush=True)


def row(layer: Layer, backward: bool, rounds: int, seconds: float) -> str:
    """A line of the table."""
    return timed_row(layer.name, backward, contenders(layer, backward), rounds, seconds)


def contenders(layer: Layer, backward: bool) -> dict[str, Contender]:
    """Three ways to run the members, with weights and inputs of their own."""
    torch.manual_seed(0)
    n, batch, channels, filters, side, kernel, stride = layer
    models = [
        nn.Conv2d(channels, filters, kernel, stride, kernel // 2, bias=False) for _ in range(n)
    ]
    x = torch.randn(n, batch, channels, side, side)
    weights = torch.stack([model.weight.detach() for model in models]).requires_grad_()
    convolve = functools.partial(torch.conv2d, stride=stride, padding=kernel // 2)
    mapped = torch.vmap(convolve)
    ens = Ensemble(models, strategy="fused")
    own = [x[i].clone().requires_grad_(backward) for i in range(n)]
    theirs, ours = x.clone().requires_grad_(backward), x.clone().requires_grad_(backward)
    weight = ens.members.weight
    assert isinstance(weight, Tensor)
    pairs = list(zip(models, own, strict=True))
    return {
        LOOP: layer_contender(
            lambda: [model(x) for model, x in pairs], own, [m.weight for m in models], backward
        ),
        VMAP: layer_contender(lambda: [mapped(theirs, weights)], [theirs], [weights], backward),
        UNISONO: layer_contender(lambda: [ens(per_member(ours))], [ours], [weight], backward),
    }


if __name__ == "__main__":
    main()
