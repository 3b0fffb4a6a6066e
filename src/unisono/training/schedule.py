"""What happens between the steps and the epochs of a training: schedulers and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from unisono.ensemble import Ensemble
from unisono.optim import MemberOptimizer
from unisono.training.history import Array, History

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
        ensemble: The whole ensemble, as the epoch left it; where members are spread over ranks and
            `fit` was given a block of them, that block. It may be changed, on all ranks alike.
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


def member_rates(optimizer: torch.optim.Optimizer, num_members: int) -> Array:
    """The learning rate of each member, that of the first parameters if there are several.

    Shape:
        - returns: (N)
    """
    groups: Sequence[Mapping[str, Any]] = optimizer.param_groups
    own = [float(group["lr"]) for group in groups if group["member"] is not None]
    return np.array(own[:num_members] if own else [float(groups[0]["lr"])] * num_members)
