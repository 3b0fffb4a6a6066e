"""What an epoch of `unisono.fit` costs after half of the members have stopped early.

Run from the root of the repository: ``python -m benchmarks.shrink``. Half of the members have
learning rate 0, so their validation loss never improves and they stop after two epochs.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.models.small import mlp
from benchmarks.predict import describe_run
from unisono import Ensemble, fit, optim

CASES = {
    "16 x 784-512-512-10, B 128": (lambda: mlp(784, 512, 512, 10), 16, (784,), 2048, 128),
    "16 x 784-128-128-10, B 64": (lambda: mlp(784, 128, 128, 10), 16, (784,), 4000, 64),
}


def main() -> None:
    """Print the median epoch before and after."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shrink", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="epochs after the members stopped")
    options = parser.parse_args()
    print(describe_run(options))
    print("\n| case | first epoch, s | with all, s | with half, s | half / first | half / all |")
    print("|---|---|---|---|---|---|", flush=True)
    for name, (make, members, shape, rows, batch) in CASES.items():
        first, full, half = _epochs(make, members, shape, rows, batch, options.rounds)
        ratios = f"{half / first:.2f} | {half / full:.2f}"
        print(f"| {name} | {first:.3f} | {full:.3f} | {half:.3f} | {ratios} |", flush=True)


def _epochs(
    make: object, members: int, shape: tuple[int, ...], rows: int, batch: int, rounds: int
) -> tuple[float, float, float]:
    """Seconds of the first epoch, of one with all members, and of one with half of them."""
    torch.manual_seed(0)
    x, y = torch.randn(rows, *shape), torch.randint(10, (rows,))
    assert callable(make)
    models: list[nn.Module] = [make() for _ in range(members)]
    ens = Ensemble(models)
    rates = [0.0 if i % 2 else 1e-4 for i in range(members)]
    history = fit(
        ens,
        (x, y),
        loss=F.cross_entropy,
        optimizer=optim.Adam(ens, lr=rates),
        epochs=4 + rounds,
        batch_size=batch,
        sampling="shuffled",
        validation=(x[:256], y[:256]),
        patience=3,
        progress=False,
    )
    running = (~np.isnan(history.loss)).sum(1)
    assert set(running) == {members, members // 2}, "half of the members were meant to stop"
    half = history.seconds[running == members // 2]
    full = history.seconds[running == members]
    # The first epoch of either measures how to run; so the medians leave it out.
    return full[0], float(np.median(full[1:])), float(np.median(half[1:]))


if __name__ == "__main__":
    main()
