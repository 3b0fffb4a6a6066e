"""A training from its first epoch to its last, and all that has to survive in between."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.engine.where import caller_level
from unisono.ensemble import Ensemble
from unisono.errors import EnsembleError, EnsembleWarning
from unisono.optim import MemberOptimizer
from unisono.rows import copy_rows
from unisono.training.batches import Batches
from unisono.training.history import Array, EpochRecord, History, Validation, make_history
from unisono.training.own_epochs import OwnEpochs
from unisono.training.progress import Progress
from unisono.training.ranks import Ranks
from unisono.training.running import Running, shared_tensors
from unisono.training.schedule import EpochEnd, Schedule, member_rates
from unisono.training.seeding import random_numbers_of
from unisono.training.sent import Sent
from unisono.training.snapshot import Snapshot
from unisono.training.steps import Recipe
from unisono.training.stopping import Stopping
from unisono.training.trained import outcome_of_all
from unisono.training.validation import Validator, validation_of


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
        ranks: The ranks that train together.
        settings: What is the same on all ranks, and when the training is taken up again.
        held_out: What the sampling keeps from each member.
        save: Called when an epoch is done; None for nothing to be called.
        records: The epochs so far.
        computed: The members that the next epoch computes.
        best: The best weights of each member at home, where they are to be put back.
        held: For each block of ranks the members whose rows are up to date there; empty for the
            blocks as they are at first.
    """

    ens: Ensemble
    optimizer: MemberOptimizer
    batches: Batches
    validator: Validator | None
    recipe: Recipe
    schedule: Schedule
    stopping: Stopping
    ranks: Ranks
    settings: Mapping[str, Any]
    held_out: Sequence[Array] = ()
    save: Callable[[Session, Running], None] | None = None
    records: list[EpochRecord] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    held: list[list[int]] = field(default_factory=list)

    def run(self, *, progress: bool) -> History:
        """Train until the last epoch, or until nobody is left; the best weights are put back."""
        done, epochs = len(self.records), self.schedule.epochs
        running = Running(self.ens, self.optimizer, self.ranks, self.held or None)
        self.held = running.held
        was_training = self.ens.training
        steps = self.batches.num_steps
        shown = progress and self.ranks.is_first
        with Progress(epochs, done, steps, self.num_members, shown=shown) as bar:
            own = OwnEpochs(
                self.batches,
                self.recipe,
                self.schedule.seed,
                after_step=self._after_step,
                after_batch=bar.step,
            )
            try:
                for epoch in range(done, epochs):
                    if not self.stopping.running:
                        break
                    self.computed = self._members_to_compute()
                    running.leave(self.computed, self.best)
                    self.held = running.held
                    record = self._epoch(epoch, running, own)
                    bar.epoch(epoch, record, len(self.stopping.running))
                    is_last = self._call_back(epoch, running)
                    if self.save is not None:
                        self.save(self, running)
                    if is_last:
                        break
            finally:
                running.push()
                self.ens.train(was_training)
        if self.stopping.patience is not None:
            self._put_best_back([i for i, why in enumerate(self.stopping.reasons) if not why])
        running.gather({})
        return self.history()

    @property
    def num_members(self) -> int:
        """N, of all ranks."""
        return self.ranks.block.num_members

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
        now = self.computed or list(range(self.num_members))
        train = self.stopping.running
        frozen = [i for i in now if self.stopping.reasons[i] == "not finite"]
        if sorted([*train, *frozen]) == now and len(frozen) <= len(train):
            return now
        return train

    def _epoch(self, epoch: int, running: Running, own: OwnEpochs) -> EpochRecord:
        start = time.perf_counter() - own.seconds_ahead
        device = next(self.ens.parameters()).device
        with random_numbers_of(self.schedule.seed, epoch, device):
            losses, rates = self._train(epoch, running, own)
            validation = self._validate(running)
        if validation is not None:
            improved, stopping = self.stopping.update(epoch, validation.loss)
            if self.stopping.patience is not None:
                self._keep_best(improved)
                self._put_best_back(stopping)
        if self.schedule.schedulers and self.schedule.every == "epoch":
            self._step_schedulers(None if validation is None else validation.loss)
            running.take_hyperparameters()
        seconds = time.perf_counter() - start - own.seconds_ahead
        record = EpochRecord(losses, rates, seconds, validation)
        self.records.append(record)
        return record

    def _train(self, epoch: int, running: Running, own: OwnEpochs) -> tuple[Array, Array]:
        """Losses and learning rates of an epoch; members that left the numbers are as before it."""
        held = self.held[self.ranks.block.index]
        rates = member_rates(self.optimizer, len(self.ens))[self.ranks.at_home(held)]
        width = max(map(len, self.held))
        here = own.take(epoch, running, self.computed)
        try:
            sent = Sent(self.ranks, here.trained.to_numbers(rates, width), here.error)
            if self._is_plain(epoch) and own.may_go_ahead(here, running):
                own.go_ahead(here, running, self.computed)
            losses, finite, rates = outcome_of_all(epoch, sent.wait(), self.held, self.computed)
        except BaseException:
            own.take_back()
            if not running.is_home:  # what is at home ends with an epoch
                here.before.restore_all()
            raise
        frozen = [i for i in self.computed if self.stopping.reasons[i]]
        lost = [i for i in self.computed if not (finite[i] or i in frozen)]
        if lost:
            own.take_back()
            self.ranks.together(lambda: self._drop(epoch, running, here.before, lost, losses))
        if again := [k for k, i in enumerate(running.members) if i in lost or i in frozen]:
            here.before.restore(again)
        losses[frozen] = np.nan
        return losses, rates

    def _is_plain(self, epoch: int) -> bool:
        """Whether the next epoch begins with what this one leaves, whatever comes of it."""
        schedule = self.schedule
        is_watched = self.validator is not None or self.save is not None
        changes = bool(schedule.schedulers or schedule.callbacks or any(self.stopping.reasons))
        return not (is_watched or changes) and epoch + 1 < schedule.epochs

    def _validate(self, running: Running) -> Validation | None:
        validator = self.validator
        if validator is None:
            return None
        running.push()
        here = self.ranks.collect(lambda: validator.measure(running))
        found = validation_of(self.ranks.first_replicas(here), self.num_members)
        frozen = [i for i in self.computed if self.stopping.reasons[i]]
        for values in (found.loss, *found.metrics.values()):
            values[frozen] = np.nan
        return found

    def _drop(
        self, epoch: int, running: Running, before: Snapshot, lost: list[int], losses: Array
    ) -> None:
        names = ", ".join(f"member {i} (loss {losses[i]:.3g})" for i in lost)
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
        self.stopping.drop(lost)
        text = (
            f"fit: in epoch {epoch} a loss or a parameter of {names} was not finite; it keeps the"
            f" state from before that epoch and trains no more. The others go on"
        )
        if self.ranks.is_first:
            warnings.warn(text, EnsembleWarning, stacklevel=caller_level())

    def _after_step(self, running: Running) -> None:
        if self.schedule.every == "step":
            self._step_schedulers(None)
            running.take_hyperparameters()

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
        here = self._held_here(members)
        copy_rows(self.best, here, now, here)

    def _put_best_back(self, members: list[int]) -> None:
        here = self._held_here([i for i in members if self.stopping.best_epoch[i] >= 0])
        if here:
            copy_rows(self.ens.stacked_tensors(), here, self.best, here)

    def _held_here(self, members: list[int]) -> list[int]:
        """The places at home of those whose rows are up to date on this rank."""
        held = self.held[self.ranks.block.index]
        return self.ranks.at_home([i for i in members if i in held])

    def _call_back(self, epoch: int, running: Running) -> bool:
        """Call the callbacks on every rank; whether one ends the training, on any rank."""
        if not self.schedule.callbacks:
            return False
        running.gather({})
        end = EpochEnd(
            epoch, self.ens, self.optimizer, self.history(), tuple(self.stopping.running)
        )
        ends = self.ranks.collect(
            lambda: True in [call(end) is True for call in self.schedule.callbacks]
        )
        running.pull()
        return any(ends)
