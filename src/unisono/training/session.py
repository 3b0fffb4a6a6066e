"""A training from its first epoch to its last, and all that has to survive in between."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from unisono.engine.where import caller_level
from unisono.ensemble import Ensemble
from unisono.errors import EnsembleError, EnsembleWarning
from unisono.optim import MemberOptimizer
from unisono.rows import copy_rows
from unisono.training.batches import Batches
from unisono.training.history import Array, EpochRecord, History, make_history
from unisono.training.progress import Progress
from unisono.training.running import Running, shared_tensors
from unisono.training.seeding import random_numbers_of
from unisono.training.snapshot import Snapshot, finite_members
from unisono.training.steps import Recipe, train_epoch
from unisono.training.stopping import Stopping
from unisono.training.validation import Validator

ScheduleEvery = Literal["epoch", "step"]


class Scheduler(Protocol):
    """What `torch.optim.lr_scheduler` has."""

    def step(self, *args: Any) -> None:
        """Set the rates for what comes next."""

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""


@dataclass(frozen=True, eq=False)
class EpochEnd:
    """What a callback gets when an epoch is done.

    Args:
        epoch: Its number, counted from 0.
        ensemble: The whole ensemble, as the epoch left it. It may be changed.
        optimizer: Its optimizer, whose param groups may be changed.
        history: All epochs so far.
        running: The members that go on.

    Example:
        >>> def stop_when_good(end: EpochEnd) -> bool:
        ...     return bool((end.history.loss[-1] < 0.1).all())
        >>> callbacks = [stop_when_good]  # for `fit`
    """

    epoch: int
    ensemble: Ensemble
    optimizer: MemberOptimizer
    history: History
    running: tuple[int, ...]


Callback = Callable[[EpochEnd], object]


@dataclass(frozen=True)
class Schedule:
    """What happens between the steps and the epochs.

    Args:
        epochs: How many.
        seed: Of the order of the data and of all random numbers.
        schedulers: Of the optimizer's rates.
        every: When they step.
        callbacks: Called after each epoch; one that returns True ends the training.
    """

    epochs: int
    seed: int
    schedulers: Sequence[Scheduler]
    every: ScheduleEvery
    callbacks: Sequence[Callback]


@dataclass
class Session:
    """A training and where it stands.

    Args:
        ens: The ensemble.
        optimizer: Its optimizer.
        batches: The training data.
        validator: None without validation data.
        recipe: How a step is done.
        schedule: How long, and what happens in between.
        stopping: Which members still train.
        held_out: What the sampling keeps from each member.
        save: Called when an epoch is done.
        records: The epochs so far.
        computed: The members that the next epoch computes.
        best: The best weights of each member, where they are to be put back.
    """

    ens: Ensemble
    optimizer: MemberOptimizer
    batches: Batches
    validator: Validator | None
    recipe: Recipe
    schedule: Schedule
    stopping: Stopping
    held_out: Sequence[Array] = ()
    save: Callable[[Session], None] = lambda session: None
    records: list[EpochRecord] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def run(self, *, progress: bool) -> History:
        """Train until the last epoch, or until nobody is left; the best weights are put back."""
        done, epochs = len(self.records), self.schedule.epochs
        running = Running(self.ens, self.optimizer)
        was_training = self.ens.training
        steps = self.batches.num_steps
        with Progress(epochs, done, steps, len(self.ens), shown=progress) as bar:
            try:
                for epoch in range(done, epochs):
                    if not self.stopping.running:
                        break
                    self.computed = self._members_to_compute()
                    running.leave(self.computed)
                    record = self._epoch(epoch, running, bar)
                    bar.epoch(epoch, record, len(self.stopping.running))
                    ends = [call(self._end_of(epoch)) for call in self.schedule.callbacks]
                    self.save(self)
                    if any(end is True for end in ends):
                        break
            finally:
                self.ens.train(was_training)
        if self.stopping.patience is not None:
            self._put_best_back([i for i, why in enumerate(self.stopping.reasons) if not why])
        return self.history()

    def history(self) -> History:
        """All epochs so far."""
        return make_history(
            self.records,
            best_epoch=self.stopping.best_epoch.copy(),
            stopped=self.stopping.reasons,
            held_out=self.held_out,
        )

    def _members_to_compute(self) -> list[int]:
        """Those that train, and perhaps frozen ones among them.

        How a kernel rounds may depend on the number of members. So that the others are bit by bit
        what they would be without it, a frozen member is computed along, and put back after each
        epoch, as long as nobody else leaves and those that train are not the minority.
        """
        now = self.computed or list(range(len(self.ens)))
        train = self.stopping.running
        frozen = [i for i in now if self.stopping.reasons[i] == "not finite"]
        if sorted([*train, *frozen]) == now and len(frozen) <= len(train):
            return now
        return train

    def _epoch(self, epoch: int, running: Running, bar: Progress) -> EpochRecord:
        start = time.perf_counter()
        rates = member_rates(self.optimizer, len(self.ens))
        device = next(self.ens.parameters()).device
        running.pull()
        with random_numbers_of(self.schedule.seed, epoch, device):
            losses = self._train(epoch, running, bar)
            running.push()
            validation = None if self.validator is None else self.validator.measure(running)
        frozen = [i for i in running.members if self.stopping.reasons[i]]
        if validation is not None:
            for values in (validation.loss, *validation.metrics.values()):
                values[frozen] = np.nan
            improved, stopping = self.stopping.update(epoch, validation.loss)
            if self.stopping.patience is not None:
                self._keep_best(improved)
                self._put_best_back(stopping)
        if self.schedule.every == "epoch":
            self._step_schedulers(None if validation is None else validation.loss)
        everyone = np.full(len(self.ens), np.nan)
        everyone[running.members] = losses
        record = EpochRecord(everyone, rates, time.perf_counter() - start, validation)
        self.records.append(record)
        return record

    def _train(self, epoch: int, running: Running, bar: Progress) -> Array:
        """The losses of an epoch; members that left the numbers are as before it, and end."""
        before = Snapshot(running.ens, running.optimizer)
        running.ens.train()
        mean, finite = train_epoch(
            running,
            self.batches.epoch(epoch, running.members),
            self.recipe,
            after_step=lambda: self._after_step(running),
            after_batch=bar.step,
        )
        finite &= finite_members(running.ens)
        losses: Array = mean.cpu().numpy()  # the epoch's only reads from the device
        frozen = [i for i, m in enumerate(running.members) if self.stopping.reasons[m]]
        lost = [i for i, is_fine in enumerate(finite.tolist()) if not (is_fine or i in frozen)]
        if lost:
            self._drop(epoch, running, before, lost, losses)
        if lost or frozen:
            before.restore([*lost, *frozen])
        losses[frozen] = np.nan
        return losses

    def _drop(
        self, epoch: int, running: Running, before: Snapshot, lost: list[int], losses: Array
    ) -> None:
        members = [running.members[i] for i in lost]
        names = ", ".join(f"member {running.members[i]} (loss {losses[i]:.3g})" for i in lost)
        trained = [n for n, t in shared_tensors(running.ens).items() if t.requires_grad]
        if trained:
            before.restore_all()
            running.push()
            raise EnsembleError(
                f"fit: in epoch {epoch} a loss or a parameter of {names} was not finite, and all"
                f" members train {', '.join(f'`{n}`' for n in trained)} together, so none is"
                f" unharmed; the ensemble is as before the epoch. Lower the learning rate, clip"
                f" with max_grad_norm=, or leave these parameters out of shared="
            )
        self.stopping.drop(members)
        warnings.warn(
            f"fit: in epoch {epoch} a loss or a parameter of {names} was not finite; it keeps the"
            f" state from before that epoch and trains no more. The others go on",
            EnsembleWarning,
            stacklevel=caller_level(),
        )

    def _after_step(self, running: Running) -> None:
        if self.schedule.every == "step":
            self._step_schedulers(None)
            if not running.is_whole:
                running.optimizer.take_hyperparameters(self.optimizer, running.members)

    def _step_schedulers(self, validation_loss: Array | None) -> None:
        for scheduler in self.schedule.schedulers:
            if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                assert validation_loss is not None  # `fit` has asked for it
                scheduler.step(float(np.nanmean(validation_loss)))
            else:
                scheduler.step()

    def _keep_best(self, members: list[int]) -> None:
        now = self.ens.stacked_tensors()
        if not self.best:
            self.best = {name: tensor.detach().clone() for name, tensor in now.items()}
        copy_rows(self.best, members, now, members)

    def _put_best_back(self, members: list[int]) -> None:
        known = [i for i in members if self.stopping.best_epoch[i] >= 0]
        if known:
            copy_rows(self.ens.stacked_tensors(), known, self.best, known)

    def _end_of(self, epoch: int) -> EpochEnd:
        running = tuple(self.stopping.running)
        return EpochEnd(epoch, self.ens, self.optimizer, self.history(), running)


def member_rates(optimizer: torch.optim.Optimizer, num_members: int) -> Array:
    """The learning rate of each member, that of the first parameters if there are several.

    Shape:
        - returns: (N)
    """
    groups: Sequence[Mapping[str, Any]] = optimizer.param_groups
    own = [float(group["lr"]) for group in groups if group["member"] is not None]
    return np.array(own[:num_members] if own else [float(groups[0]["lr"])] * num_members)
