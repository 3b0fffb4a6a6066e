"""An ensemble inside of a LightningModule: nothing about it is special.

pip install lightning
python examples/lightning_module.py
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from own_loop import BATCH_SIZE, EPOCHS, RATES, build, load
from unisono import Ensemble, fit, member_losses, optim


class LitEnsemble(lightning.LightningModule):
    """All members see the minibatches of the trainer; each has its own learning rate."""

    def __init__(self, ens: Ensemble) -> None:
        super().__init__()
        self.ens = ens

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The sum of the members' losses, so that each gets its own gradient."""
        x, y = batch
        losses = member_losses(F.cross_entropy, self.ens(x), y)
        self.log_dict({f"loss/member {i}": loss for i, loss in enumerate(losses.detach())})
        return losses.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One of unisono's optimizers is one of torch's."""
        return optim.Adam(self.ens, lr=RATES)


def train_by_lightning(loader: DataLoader[tuple[Tensor, Tensor]]) -> Ensemble:
    """Train with a Lightning trainer on the CPU."""
    module = LitEnsemble(build())
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return module.ens


def main() -> None:
    """Train by Lightning and by `fit` on the same minibatches, and compare."""
    loader = DataLoader(TensorDataset(*load()), BATCH_SIZE)
    by_lightning, by_fit = train_by_lightning(loader), build()
    fit(
        by_fit,
        loader,
        loss=F.cross_entropy,
        optimizer=optim.Adam(by_fit, lr=RATES),
        epochs=EPOCHS,
        progress=False,
    )
    tensors = by_fit.state_dict()
    same = all(torch.equal(t, tensors[name]) for name, t in by_lightning.state_dict().items())
    print(f"Lightning and fit give {'the same' if same else 'different'} weights")


if __name__ == "__main__":
    main()
