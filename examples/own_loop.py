"""Your own training loop, and `fit`: the same weights.

    python examples/own_loop.py

Ten networks with ten learning rates learn scikit-learn's digits, each in its own order.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import unisono
from unisono import Ensemble, combine, fit, member_losses, optim, per_member

MEMBERS, EPOCHS, BATCH_SIZE = 10, 5, 64
RATES = torch.logspace(-3, -1, MEMBERS).tolist()


def make_model() -> nn.Module:
    """A network of two layers."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def load() -> tuple[Tensor, Tensor]:
    """1,797 images of 8 x 8 pixels, and the digits that they show."""
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def build() -> Ensemble:
    """The members from fixed seeds, run in one named way: two runs agree to the last bit."""
    return Ensemble.build(make_model, MEMBERS, seed=0, strategy="fused")


def train_by_loop(x: Tensor, y: Tensor) -> Ensemble:
    """A loop as you know it. Only the data has one more axis."""
    ens = build()
    optimizer = optim.Adam(ens, lr=RATES)
    orders = unisono.sampling.shuffled()
    for epoch in range(EPOCHS):
        order = orders.order(len(x), range(MEMBERS), epoch, seed=0, num_members=MEMBERS)
        steps = -(-len(x) // BATCH_SIZE)
        for rows in torch.from_numpy(order).tensor_split(steps, dim=1):  # (N, B)
            outputs = ens(per_member(x[rows]))  # (N, B, 10)
            losses = member_losses(F.cross_entropy, outputs, per_member(y[rows]))  # (N,)
            losses.sum().backward()  # the sum: each member gets the gradient of its own loss
            optimizer.step()
            optimizer.zero_grad()
    return ens


def train_by_fit(x: Tensor, y: Tensor) -> Ensemble:
    """The same in one call."""
    ens = build()
    fit(
        ens,
        (x, y),
        loss=F.cross_entropy,
        optimizer=optim.Adam(ens, lr=RATES),
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        sampling="shuffled",
        progress=False,
    )
    return ens


def main() -> None:
    """Train both ways and print how good the members are."""
    x, y = load()
    one, other = train_by_loop(x[:1400], y[:1400]), train_by_fit(x[:1400], y[:1400])
    tensors = other.state_dict()
    same = all(torch.equal(tensor, tensors[name]) for name, tensor in one.state_dict().items())
    print(f"the loop and fit give {'the same' if same else 'different'} weights")
    with torch.no_grad():
        logits = one.eval()(x[1400:])
    for rate, own in zip(RATES, (logits.argmax(-1) == y[1400:]).double().mean(1), strict=True):
        print(f"learning rate {rate:.4f}: {own:.1%}")
    together = combine.probabilities(logits).argmax(-1) == y[1400:]
    print(f"all together:         {together.double().mean():.1%}")


if __name__ == "__main__":
    main()
