"""A sweep of learning rates on MNIST: one ensemble against solo runs one after another.

Run from the root of the repository: ``python -m benchmarks.sweep``. Both train the network of
PyTorch's ensembling tutorial from the same initial weights on the same minibatches, and answer the
same 1,000 test images. It is what ``unisono train --lr log:1e-4:1e-1 --members 64`` does, without
the pictures. Rounding differs between the two, and training magnifies it, the more the higher the
learning rate: with ``--double`` accuracies are equal but for the highest rates.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.predict import describe_run
from unisono.commands.arguments import parse_rates
from unisono.commands.data import Split, load_mnist5k
from unisono.commands.learning import Settings, train_classifier
from unisono.commands.models import SimpleMLP
from unisono.training.sampling import as_sampling


class Silent:
    """Nobody is told."""

    def epoch(self, number: int, losses: list[float]) -> None:
        """Nothing."""


def main() -> None:
    """Time both, and compare what the members know."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each of the two")
    parser.add_argument("--double", action="store_true", help="float64 instead of float32")
    options = parser.parse_args()
    print(describe_run(options), flush=True)
    dtype = torch.float64 if options.double else torch.float32
    split = _in(load_mnist5k(), dtype)
    rates = parse_rates(["log:1e-4:1e-1"], options.members)
    how = Settings(options.members, options.epochs, 0, rates, 64, torch.device("cpu"))
    times: dict[str, list[float]] = {"solo": [], "ensemble": []}
    accuracies: dict[str, Tensor] = {}
    for _ in range(options.rounds):
        start = time.perf_counter()
        accuracies["solo"] = torch.stack([_solo(split, how, i, dtype) for i in range(how.members)])
        times["solo"].append(time.perf_counter() - start)
        start = time.perf_counter()
        trained = train_classifier(lambda: SimpleMLP().to(dtype), split, how, Silent())
        accuracies["ensemble"] = (trained.logits.argmax(-1) == split.test_labels).double().mean(1)
        times["ensemble"].append(time.perf_counter() - start)
        print({name: f"{own[-1]:.2f} s" for name, own in times.items()}, flush=True)
    middle = {name: sorted(own)[len(own) // 2] for name, own in times.items()}
    print(f"solo runs / ensemble: {middle['solo'] / middle['ensemble']:.2f} (medians)")
    apart = (accuracies["solo"] - accuracies["ensemble"]).abs() * len(split.test_labels)
    print(f"accuracies equal for {int((apart < 0.5).sum())} of {how.members} members;")
    small = apart[torch.tensor(rates) <= 1e-2]
    print(
        f"at most {apart.max():.0f} of {len(split.test_labels)} images apart, at most"
        f" {small.max():.0f} for rates up to 0.01"
    )


def _solo(split: Split, how: Settings, i: int, dtype: torch.dtype) -> Tensor:
    """The test accuracy of one model after a training of its own."""
    torch.manual_seed(how.seed + i)
    model = SimpleMLP().to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=how.rates[i])
    images, labels = split.training
    kind = as_sampling(how.sampling)
    steps = math.ceil(len(images) / how.batch_size)
    for epoch in range(how.epochs):
        order = kind.order(len(images), [i], epoch, seed=how.seed, num_members=how.members)[0]
        for rows in torch.from_numpy(order).tensor_split(steps):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        found = model.eval()(split.test_images).argmax(-1)
    return (found == split.test_labels).double().mean()


def _in(split: Split, dtype: torch.dtype) -> Split:
    return Split(
        split.train_images.to(dtype),
        split.train_labels,
        split.test_images.to(dtype),
        split.test_labels,
        split.classes,
    )


if __name__ == "__main__":
    main()
