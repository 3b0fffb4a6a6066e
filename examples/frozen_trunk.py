"""One frozen trunk, many heads: the trunk is stored once and computed once.

    pip install "unisono[sklearn]"
    python examples/frozen_trunk.py

A network learns to tell scikit-learn's digits 0 to 4 apart. Its convolutions, frozen, then serve
sixteen heads that learn all ten digits, each with a learning rate of its own.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from unisono import Ensemble, combine, fit, optim

HEADS, EPOCHS = 16, 10


class Net(nn.Module):
    """A trunk of two convolutions, and a head of two layers."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, classes))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) -> (B, classes)."""
        return self.head(self.trunk(x))


def load() -> tuple[Tensor, Tensor]:
    """1,797 images of 8 x 8 pixels, and the digits that they show."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)
    return images.unsqueeze(1), torch.tensor(digits.target)


def pretrain(x: Tensor, y: Tensor) -> nn.Module:
    """The trunk of a network that has learned the digits 0 to 4; it won't be trained again."""
    known = y < 5
    one = Ensemble.build(lambda: Net(5), 1, seed=0, strategy="fused")
    data = x[known], y[known]
    fit(one, data, loss=F.cross_entropy, optimizer=optim.Adam(one), epochs=5, progress=False)
    (net,) = one.unstack()
    assert isinstance(net, Net)
    return net.trunk.requires_grad_(False)


def build(trunk: nn.Module, heads: int) -> Ensemble:
    """Heads from seeds of their own on one trunk."""

    def make() -> Net:
        net = Net(10)
        net.trunk.load_state_dict(trunk.state_dict())
        net.trunk.requires_grad_(False)
        return net

    return Ensemble.build(make, heads, seed=0, shared="trunk.*", strategy="fused")


def train(ens: Ensemble, x: Tensor, y: Tensor, *, epochs: int = EPOCHS) -> None:
    """All heads see the same minibatches, so the trunk computes each of them once."""
    fit(
        ens,
        (x, y),
        loss=F.cross_entropy,
        optimizer=optim.Adam(ens, lr=torch.logspace(-2.5, -2, len(ens)).tolist()),
        epochs=epochs,
        batch_size=64,
        sampling="shared",
        progress=False,
    )


@torch.no_grad()
def count_flops(model: nn.Module, x: Tensor) -> int:
    """Floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops()


def main() -> None:
    """Train the heads, and count what a call costs."""
    x, y = load()
    trunk = pretrain(x[:700], y[:700])
    ens = build(trunk, HEADS)
    train(ens, x[:1400], y[:1400])
    with torch.no_grad():
        logits = ens(x[1400:])
    own = (logits.argmax(-1) == y[1400:]).double().mean(1)
    together = (combine.probabilities(logits).argmax(-1) == y[1400:]).double().mean()
    print(f"heads {own.min():.1%} to {own.max():.1%}, together {together:.1%}")
    stored = sum(p.numel() for p in ens.parameters())
    frozen = sum(p.numel() for p in trunk.parameters())
    print(f"parameters: {stored:,} for {HEADS} heads, {frozen:,} of them the trunk's")
    x = x[:64]
    print(f"a call with {len(x)} images, in million operations:")
    print(f"  the trunk alone: {count_flops(trunk, x) / 1e6:.1f}")
    for heads in (1, 4, HEADS):
        print(f"  with {heads:2} heads: {count_flops(build(trunk, heads), x) / 1e6:.1f}")


if __name__ == "__main__":
    main()
