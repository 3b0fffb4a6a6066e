"""The members that still train: at first the ensemble itself, later a smaller one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unisono.ensemble import Ensemble
from unisono.optim import MemberOptimizer
from unisono.rows import copy_rows


class Running:
    """What trains on behalf of an ensemble of which some members have stopped.

    While all members train it is the ensemble, with its own optimizer. Later it is an ensemble
    of copies of those left, so that a step costs what they cost; `push` brings their rows home.

    Args:
        ens: The whole ensemble.
        optimizer: Its optimizer.
    """

    def __init__(self, ens: Ensemble, optimizer: MemberOptimizer) -> None:
        self.whole = ens
        self.whole_optimizer = optimizer
        self.members = list(range(len(ens)))
        self.ens = ens
        self.optimizer = optimizer

    @property
    def is_whole(self) -> bool:
        """Whether all members train."""
        return self.ens is self.whole

    def leave(self, members: Sequence[int]) -> None:
        """Go on with only these members of the whole ensemble, at least one."""
        if list(members) == self.members:
            return
        self.members = list(members)
        self.whole_optimizer.zero_grad()  # what stopped needs no gradients
        self.ens = self.whole[self.members]
        self.optimizer = self.whole_optimizer.select(self.ens, self.members)

    def pull(self) -> None:
        """Take over what was changed in the whole ensemble since `push`, hyperparameters too."""
        if self.is_whole:
            return
        own, theirs = self.ens.stacked_tensors(), self.whole.stacked_tensors()
        copy_rows(own, range(len(self.members)), theirs, self.members)
        _copy_shared(self.ens, self.whole)
        self.optimizer.take(self.whole_optimizer, self.members)

    def push(self) -> None:
        """Bring the rows of the members that train, and what all share, to the whole ensemble."""
        if self.is_whole:
            return
        own, theirs = self.ens.stacked_tensors(), self.whole.stacked_tensors()
        copy_rows(theirs, self.members, own, range(len(self.members)))
        _copy_shared(self.whole, self.ens)
        self.whole_optimizer.write_back(self.optimizer, self.members)


@torch.no_grad()
def _copy_shared(target: Ensemble, source: Ensemble) -> None:
    theirs = shared_tensors(source)
    for name, tensor in shared_tensors(target).items():
        tensor.copy_(theirs[name])


def shared_tensors(ens: Ensemble) -> dict[str, Tensor]:
    """The tensors that are kept once for all members, by name."""
    named = [*ens.members.named_parameters(), *ens.members.named_buffers()]
    return {name: tensor for name, tensor in named if name in ens.shared}
