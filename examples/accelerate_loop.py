"""An ensemble in a loop of Hugging Face Accelerate.

pip install accelerate
python examples/accelerate_loop.py
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from own_loop import BATCH_SIZE, EPOCHS, RATES, build, load
from unisono import Ensemble, fit, member_losses, optim


def train_by_accelerate(loader: DataLoader[tuple[Tensor, Tensor]]) -> Ensemble:
    """A loop of Accelerate as in its documentation, with the sum of the members' losses."""
    accelerator = Accelerator(cpu=True)
    ens = build()
    optimizer = optim.Adam(ens, lr=RATES)
    prepared, optimizer, loader = accelerator.prepare(ens, optimizer, loader)
    for _ in range(EPOCHS):
        for x, y in loader:
            losses = member_losses(F.cross_entropy, prepared(x), y)  # (N,)
            accelerator.backward(losses.sum())
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(prepared)


def main() -> None:
    """Train by Accelerate and by `fit` on the same minibatches, and compare."""
    loader = DataLoader(TensorDataset(*load()), BATCH_SIZE)
    by_accelerate, by_fit = train_by_accelerate(loader), build()
    fit(
        by_fit,
        loader,
        loss=F.cross_entropy,
        optimizer=optim.Adam(by_fit, lr=RATES),
        epochs=EPOCHS,
        progress=False,
    )
    tensors = by_fit.state_dict()
    same = all(torch.equal(t, tensors[name]) for name, t in by_accelerate.state_dict().items())
    print(f"Accelerate and fit give {'the same' if same else 'different'} weights")


if __name__ == "__main__":
    main()
