"""What weights and temperatures bring on 5,000 MNIST images, and where they bring nothing.

Run from the root of the repository: ``python -m benchmarks.combination``. Weights and temperatures
are fitted on 500 validation images and measured on 1,000 test images; each number is the mean over
seeds, with the standard deviation over them behind it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from unisono import Ensemble, calibration, combine, fit, optim, selection
from unisono.commands.data import hold_out, load_mnist5k
from unisono.commands.machine import describe_machine

MEMBERS = 10
RATES = {
    "members of varying quality: learning rates 1e-4 to 1e-1": torch.logspace(-4, -1, MEMBERS),
    "members alike: learning rate 1e-3": torch.full((MEMBERS,), 1e-3),
}
Scores = tuple[float, float, float]
Method = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Print one table for each kind of ensemble."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.combination", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="ensembles of each kind")
    parser.add_argument("--epochs", type=int, default=15, help="of each training")
    options = parser.parse_args()
    machine = describe_machine(torch.device("cpu"))
    print(f"{machine['cpu']}, Python {machine['python']}, torch {machine['torch']}", end="")
    print(f", {options.seeds} seeds, {options.epochs} epochs")
    for name, rates in RATES.items():
        runs = [scores_of(rates, seed, options.epochs) for seed in range(options.seeds)]
        print(
            f"\n{name}\n\n| prediction | NLL, nats | accuracy | ECE, 15 bins |\n|---|---|---|---|"
        )
        for method in runs[0]:
            found = torch.tensor([run[method] for run in runs], dtype=torch.float64)  # (seeds, 3)
            mean, spread = found.mean(0).tolist(), found.std(0).tolist()
            print(
                f"| {method} | {mean[0]:.3f} ± {spread[0]:.3f} | {mean[1]:.1%} ± {spread[1]:.1%}"
                f" | {mean[2]:.3f} ± {spread[2]:.3f} |",
                flush=True,
            )


def scores_of(rates: Tensor, seed: int, epochs: int) -> dict[str, Scores]:
    """Train an ensemble, and score all that can be made of its members."""
    split = load_mnist5k()
    train, (images, y) = hold_out(split)
    ens = Ensemble.build(make_model, len(rates), seed=1000 * seed, strategy="fused")
    fit(
        ens,
        train,
        loss=F.cross_entropy,
        optimizer=optim.Adam(ens, lr=rates.tolist()),
        epochs=epochs,
        batch_size=32,
        sampling="bootstrap",
        seed=seed,
        progress=False,
    )
    with torch.no_grad():
        held_out, test = ens(images).double(), ens(split.test_images).double()
    found = {"a member, mean": _mean_member(test, split.test_labels)}
    best = int(torch.stack([F.cross_entropy(z, y) for z in held_out]).argmin())
    found["the member best in validation"] = score(test[best].softmax(-1), split.test_labels)
    for name, method in METHODS.items():
        found[name] = score(method(held_out, y, test), split.test_labels)
    return found


def make_model() -> nn.Module:
    """A small network for images of 28 x 28 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def score(p: Tensor, y: Tensor) -> Scores:
    """Negative log-likelihood, accuracy, and expected calibration error of probabilities."""
    likely = p.clamp_min(torch.finfo(torch.float32).tiny).log()
    ece = multiclass_calibration_error(p, y, num_classes=p.shape[-1], n_bins=15)
    return float(F.nll_loss(likely, y)), float((p.argmax(-1) == y).double().mean()), float(ece)


def _mean_member(test: Tensor, y: Tensor) -> Scores:
    each = torch.tensor([score(z.softmax(-1), y) for z in test])
    nll, accuracy, ece = each.mean(0).tolist()
    return nll, accuracy, ece


def _plain(held_out: Tensor, y: Tensor, test: Tensor) -> Tensor:
    return combine.probabilities(test)


def _greedy(held_out: Tensor, y: Tensor, test: Tensor) -> Tensor:
    return combine.weighted(test.softmax(-1), selection.greedy(held_out.softmax(-1), y))


def _convex(held_out: Tensor, y: Tensor, test: Tensor) -> Tensor:
    return combine.weighted(test.softmax(-1), selection.convex_weights(held_out.softmax(-1), y))


def _own(held_out: Tensor, y: Tensor, test: Tensor) -> Tensor:
    t = calibration.member_temperatures(held_out, y)
    return combine.probabilities(calibration.apply(test, t))


def _pooled(held_out: Tensor, y: Tensor, test: Tensor) -> Tensor:
    t = calibration.pooled_temperature(held_out, y)
    return (calibration.pool(test) / t).softmax(-1)


def _all(held_out: Tensor, y: Tensor, test: Tensor) -> Tensor:
    t = calibration.member_temperatures(held_out, y)
    w = selection.convex_weights(calibration.apply(held_out, t).softmax(-1), y)
    pooled = calibration.pooled_temperature(held_out, y, weights=w, temperatures=t)
    return (calibration.pool(test, weights=w, temperatures=t) / pooled).softmax(-1)


METHODS: dict[str, Method] = {
    "plain mean": _plain,
    "`greedy` weights": _greedy,
    "`convex_weights`": _convex,
    "`member_temperatures`, plain mean": _own,
    "plain mean, `pooled_temperature`": _pooled,
    "all three, convex": _all,
}


if __name__ == "__main__":
    main()
