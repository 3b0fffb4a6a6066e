"""Which members go on: early stopping for each, and those whose loss left the numbers."""

from __future__ import annotations

import numpy as np

from unisono.training.history import Array, Stop


class Stopping:
    """Who still trains, who did best when.

    A member stops when its validation loss has not improved by more than ``min_delta`` for
    ``patience`` epochs, exactly as it would alone.

    Args:
        num_members: N.
        patience: Epochs without improvement; None for never.
        min_delta: A loss has improved if it is lower by more than this.
    """

    def __init__(self, num_members: int, *, patience: int | None, min_delta: float) -> None:
        self.patience = patience
        self.min_delta = min_delta
        self.best = np.full(num_members, np.inf)
        self.best_epoch = np.full(num_members, -1)
        self.reasons: list[Stop] = [""] * num_members

    @property
    def running(self) -> list[int]:
        """The members that still train."""
        return [i for i, why in enumerate(self.reasons) if not why]

    def drop(self, members: list[int]) -> None:
        """Let these members end, because their loss isn't finite."""
        for i in members:
            self.reasons[i] = "not finite"

    def update(self, epoch: int, loss: Array) -> tuple[list[int], list[int]]:
        """Take note of the validation loss of an epoch.

        Args:
            epoch: Its number, counted from 0.
            loss: Of all members; those that don't train any more are passed over.

        Returns:
            The members that did better than ever, and those that stop now.

        Shape:
            - loss: (N)
        """
        running = self.running
        improved = [i for i in running if loss[i] < self.best[i] - self.min_delta]
        for i in improved:
            self.best[i] = loss[i]
            self.best_epoch[i] = epoch
        if self.patience is None:
            return improved, []
        stopping = [i for i in running if epoch - self.best_epoch[i] >= self.patience]
        for i in stopping:
            self.reasons[i] = "patience"
        return improved, stopping
