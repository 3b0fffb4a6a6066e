"""Training N classifiers at once with `unisono.fit`, and what comes out."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono import Ensemble, EnsembleWarning, fit, optim
from unisono.commands.data import Split, hold_out
from unisono.commands.models import MakeModel
from unisono.training.history import History
from unisono.training.schedule import EpochEnd

_TEST_BATCH: Final = 500


class Reporter(Protocol):
    """Who is told how the training goes."""

    def epoch(self, number: int, losses: list[float]) -> None:
        """Epoch ``number``, counted from 1, ended with these mean losses, one per member."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        members: Number of models.
        epochs: How often every member sees its images.
        seed: Member i starts from `seed` + i and has its own order of the images, so
            it is the same in a larger ensemble.
        rates: Learning rate of Adam, one for each member.
        batch_size: Images per minibatch, at most.
        device: Where to train.
        sampling: Which images each member sees: a name that `unisono.fit` knows.
        patience: Epochs without a lower validation loss after which a member stops; None to
            train on all images, without validation.
        checkpoint: Where to keep what a resumed training needs; None for nowhere.
        checkpoint_every: Epochs from one writing of it to the next.
        resume: Whether to go on from it.
    """

    members: int
    epochs: int
    seed: int
    rates: tuple[float, ...]
    batch_size: int
    device: torch.device
    sampling: str = "shuffled"
    patience: int | None = None
    checkpoint: Path | None = None
    checkpoint_every: int = 1
    resume: bool = False


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training leaves.

    Args:
        ensemble: The trained members, in eval mode.
        history: Losses and rates of each epoch and member.
        logits: Of the test images; float64, on the CPU.

    Shape:
        - logits: ``(N, test images, classes)``
    """

    ensemble: Ensemble
    history: History
    logits: Tensor


def train_classifier(
    make_model: MakeModel, split: Split, settings: Settings, reporter: Reporter
) -> Trained:
    """Train `settings.members` models at once and let them answer the test images.

    Args:
        make_model: Makes one member.
        split: The images.
        settings: How to train.
        reporter: Told of every epoch.

    Returns:
        The trained ensemble with its losses and test logits; the same for the same
        arguments on the same machine.

    Raises:
        CheckpointError: If ``settings.resume`` is set and the checkpoint is of another training.
    """
    # Named, not measured: two runs give the same digits.
    ensemble = Ensemble.build(
        make_model, settings.members, seed=settings.seed, strategy="fused"
    ).to(settings.device)
    ensemble._planner.store_for_training()
    train, validation = split.training, None
    if settings.patience is not None:
        train, validation = hold_out(split)
    same = len(set(settings.rates)) == 1
    rates = settings.rates[0] if same else list(settings.rates)

    def report(end: EpochEnd) -> None:
        losses = end.history.loss[-1]
        reporter.epoch(end.epoch + 1, [x for x in losses.tolist() if not math.isnan(x)])

    with warnings.catch_warnings():
        # Who stopped, and why, stands in the report.
        warnings.filterwarnings("ignore", message="fit: in epoch", category=EnsembleWarning)
        history = fit(
            ensemble,
            train,
            loss=F.cross_entropy,
            optimizer=optim.Adam(ensemble, lr=rates),
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            sampling=settings.sampling,
            validation=validation,
            patience=settings.patience,
            checkpoint=settings.checkpoint,
            checkpoint_every=settings.checkpoint_every,
            resume=settings.resume,
            callbacks=[report],
            seed=settings.seed,
            progress=False,
        )
    return Trained(ensemble, history, predict(ensemble, split.test_images, settings.device))


@torch.no_grad()
def predict(ensemble: Ensemble, images: Tensor, device: torch.device) -> Tensor:
    """Return every member's logits for the same images, in eval mode.

    Shape:
        - images: ``(B, ...)``
        - output: ``(N, B, classes)``, float64 on the CPU
    """
    ensemble.eval()
    parts = [ensemble(part.to(device)) for part in torch.split(images, _TEST_BATCH)]
    return torch.cat(parts, dim=1).cpu().double()
