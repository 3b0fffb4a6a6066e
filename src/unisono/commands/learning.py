"""Training N classifiers at once, each in its own order of the images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from unisono import Ensemble, per_member
from unisono.commands.data import Split
from unisono.commands.models import MakeModel

_TEST_BATCH = 500


class Reporter(Protocol):
    """Who is told how the training goes."""

    def step(self) -> None:
        """One minibatch is done."""

    def epoch(self, losses: list[float]) -> None:
        """Every image was seen once more, with these mean losses, one per member."""


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        members: Number of models.
        epochs: How often every member sees every image.
        seed: Member i starts from `seed` + i and has its own order of the images, so
            it is the same in a larger ensemble.
        lr: Learning rate of Adam.
        batch_size: Images per minibatch, at most.
        device: Where to train.
    """

    members: int
    epochs: int
    seed: int
    lr: float
    batch_size: int
    device: torch.device


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training leaves.

    Args:
        ensemble: The trained members, in eval mode.
        losses: Mean training loss of each epoch and member.
        logits: Of the test images; float64, on the CPU.

    Shape:
        - losses: ``(epochs, N)``
        - logits: ``(N, test images, classes)``
    """

    ensemble: Ensemble
    losses: list[list[float]]
    logits: Tensor


def train_classifier(
    make_model: MakeModel, split: Split, settings: Settings, reporter: Reporter
) -> Trained:
    """Train `settings.members` models at once and let them answer the test images.

    The loss is the sum of the members' mean cross entropies and Adam works on each number
    by itself, so every member learns exactly as it would alone.

    Args:
        make_model: Makes one member.
        split: The images.
        settings: How to train.
        reporter: Told of every step and epoch.

    Returns:
        The trained ensemble with its losses and test logits; the same for the same
        arguments on the same machine.
    """
    device = settings.device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        # Named, not measured: two runs give the same digits.
        ensemble = Ensemble.build(
            make_model, settings.members, seed=settings.seed, strategy="fused"
        ).to(device)
        torch.manual_seed(settings.seed)  # for models that draw in `forward`, such as dropout
        losses = _fit(ensemble, split, settings, reporter)
    return Trained(ensemble, losses, predict(ensemble, split.test_images, device))


def _fit(
    ensemble: Ensemble, split: Split, settings: Settings, reporter: Reporter
) -> list[list[float]]:
    images = split.train_images.to(settings.device)
    labels = split.train_labels.to(settings.device)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=settings.lr)
    generators = [order_generator(settings.seed, i) for i in range(settings.members)]
    steps = count_steps(len(images), settings.batch_size)
    history = []
    ensemble.train()
    for _ in range(settings.epochs):
        orders = [torch.randperm(len(images), generator=g) for g in generators]
        order = torch.stack(orders).to(settings.device)  # (N, images)
        total = torch.zeros(settings.members, device=settings.device)
        for chosen in order.tensor_split(steps, dim=1):  # (N, B)
            optimizer.zero_grad()
            logits = ensemble(per_member(images[chosen]))  # (N, B, classes)
            loss = mean_losses(logits, labels[chosen])  # (N,)
            torch.autograd.backward(loss.sum())
            optimizer.step()
            total += loss.detach() * chosen.shape[1]
            reporter.step()
        history.append((total / len(images)).tolist())  # the only read from the device
        reporter.epoch(history[-1])
    return history


def count_steps(images: int, batch_size: int) -> int:
    """Return the minibatches of one epoch.

    Their sizes differ by one image at most, instead of one small rest at the end: batch
    norm dislikes a tiny batch, and fewer shapes mean fewer plans to measure.

    Example:
        >>> count_steps(4000, 64)
        63
    """
    return math.ceil(images / batch_size)


def order_generator(seed: int, member: int) -> torch.Generator:
    """Return the source of one member's orders; it depends on nothing but the arguments."""
    state = np.random.SeedSequence((seed, member)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each member's mean cross entropy.

    Shape:
        - logits: ``(N, B, classes)``
        - labels: ``(N, B)``
        - output: ``(N,)``

    Example:
        >>> mean_losses(torch.zeros(3, 5, 2), torch.zeros(3, 5, dtype=torch.int64)).shape
        torch.Size([3])
    """
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view_as(labels).mean(1)


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
