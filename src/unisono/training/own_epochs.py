"""Epochs of the members on this rank, one at a time, and at times one ahead of the other ranks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from unisono.training.batches import Batches
from unisono.training.gradients import same_buffers
from unisono.training.running import Running
from unisono.training.seeding import random_numbers_of
from unisono.training.snapshot import Snapshot, finite_members
from unisono.training.steps import Recipe, train_epoch
from unisono.training.tensors import TensorBatches
from unisono.training.trained import Trained

# Seconds. Ranks differ by disturbances that even out over some epochs if these are short. To go
# ahead in long ones would win nothing, and keep a second copy of what is trained.
_SHORT: Final = 1.0
_NOBODY: Final = Trained(np.empty(0), np.empty(0, bool), None)


@dataclass(frozen=True)
class OwnEpoch:
    """One epoch of the members on this rank.

    Args:
        number: Counted from 0.
        before: What was trained, as it was at the start.
        trained: What came of it; nothing if there is an error.
        error: Why it came to no end.
        seconds: What it took.
    """

    number: int
    before: Snapshot
    trained: Trained
    error: Exception | None
    seconds: float

    @property
    def is_fine(self) -> bool:
        """Whether all members here got through it with numbers."""
        return self.error is None and bool(self.trained.finite.all())


class OwnEpochs:
    """Computes the epochs of this rank.

    Args:
        batches: The training data.
        recipe: How a step is done.
        seed: Of the random numbers of an epoch that is computed ahead.
        after_step: Called after each step of the optimizer.
        after_batch: Called after each minibatch.
    """

    def __init__(
        self,
        batches: Batches,
        recipe: Recipe,
        seed: int,
        *,
        after_step: Callable[[Running], None],
        after_batch: Callable[[], None],
    ) -> None:
        self._batches = batches
        self._recipe = recipe
        self._seed = seed
        self._after_step = after_step
        self._after_batch = after_batch
        self._next: OwnEpoch | None = None

    @property
    def seconds_ahead(self) -> float:
        """What the epoch took that is computed ahead; 0 if there is none."""
        return 0.0 if self._next is None else self._next.seconds

    def take(self, number: int, running: Running, computed: Sequence[int]) -> OwnEpoch:
        """An epoch, computed now unless it is already.

        Args:
            number: Counted from 0.
            running: The members here.
            computed: Those of all ranks.

        The global generators are seeded for it by the caller.
        """
        own, self._next = self._next, None
        if own is None:
            return self._compute(number, running, computed, self._after_batch)
        for _ in range(self._batches.num_steps or 0):
            self._after_batch()
        return own

    def may_go_ahead(self, own: OwnEpoch, running: Running) -> bool:
        """Whether the epoch after this one needs no other rank, and can be done a second time."""
        return (
            not (running.ranks.is_alone or running.is_idle)
            and running.gradients is None  # which ranks sum in each step
            and isinstance(self._batches, TensorBatches)
            and own.is_fine
            and own.seconds < _SHORT
        )

    def go_ahead(self, own: OwnEpoch, running: Running, computed: Sequence[int]) -> None:
        """Compute the next epoch while other ranks are still at this one.

        That of this rank is the same unless one of them fails, or loses a member: see `take_back`.
        """
        number = own.number + 1
        with random_numbers_of(self._seed, number, next(running.ens.parameters()).device):
            self._next = self._compute(number, running, computed, _nothing)

    def take_back(self) -> None:
        """Undo what was computed ahead."""
        if self._next is not None:
            self._next.before.restore_all()
            self._next = None

    def _compute(
        self,
        number: int,
        running: Running,
        computed: Sequence[int],
        after_batch: Callable[[], None],
    ) -> OwnEpoch:
        start = time.perf_counter()
        before = Snapshot(running.ens, running.optimizer)
        trained: Trained = _NOBODY
        failure: Exception | None = None
        try:
            trained = self._train(number, running, computed, after_batch)
        except BaseException as error:
            if not running.is_home:  # what is at home ends with an epoch
                before.restore_all()
            if running.ranks.is_alone or not isinstance(error, Exception):
                raise
            failure = error  # raised when the others have heard of it
        return OwnEpoch(number, before, trained, failure, time.perf_counter() - start)

    def _train(
        self,
        number: int,
        running: Running,
        computed: Sequence[int],
        after_batch: Callable[[], None],
    ) -> Trained:
        if running.is_idle:
            if self._batches.generators:  # so that those of all ranks stand at the same place
                deque(self._batches.epoch(number, computed[:1]), maxlen=0)
            return _NOBODY
        running.ens.train()
        running.go_ahead()
        mean, finite, rows = train_epoch(
            running,
            self._batches.epoch(number, running.members),
            self._recipe,
            after_step=lambda: self._after_step(running),
            after_batch=after_batch,
        )
        same_buffers(running.ens, running.ranks.block)
        finite &= finite_members(running.ens)
        # The epoch's only reads from the device.
        return Trained(mean.cpu().numpy(), finite.cpu().numpy(), rows)


def _nothing() -> None:
    """After a minibatch of which nobody is to hear yet."""
