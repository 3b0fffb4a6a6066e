"""The members that still train: at first the ensemble itself, later a smaller one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unisono.block import Block
from unisono.collectives import broadcast_first
from unisono.ensemble import Ensemble
from unisono.optim import MemberOptimizer
from unisono.rows import copy_rows
from unisono.training.exchange import gather_members
from unisono.training.gradients import SummedGradients, is_summed
from unisono.training.ranks import Ranks
from unisono.training.shares import spread_evenly


class Running:
    """What trains on behalf of an ensemble of which some members have stopped.

    While all members train it is the ensemble, with its own optimizer. Later it is an ensemble
    of copies of those left, so that a step costs what they cost; `push` brings their rows home.
    With other ranks that have all members at home too, it is copies of this rank's share of them,
    and `gather` brings the rows of all shares to every rank.

    Args:
        ens: The ensemble at home: all members, or those of a block.
        optimizer: Its optimizer.
        ranks: The ranks that train.
        held: For each block the members whose rows are up to date there; None at first.
    """

    def __init__(
        self,
        ens: Ensemble,
        optimizer: MemberOptimizer,
        ranks: Ranks,
        held: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.home = ens
        self.home_optimizer = optimizer
        self.ranks = ranks
        self.held = ranks.blocks() if held is None else [list(own) for own in held]
        self.members = [] if ranks.have_all else list(ranks.home)
        self.ens = ens
        self.optimizer = optimizer
        self.gradients = self._summed()
        self._is_ahead = False  # of what is at home

    @property
    def is_home(self) -> bool:
        """Whether the ensemble at home trains, and no copies."""
        return self.ens is self.home

    @property
    def is_idle(self) -> bool:
        """Whether there are fewer members left than ranks, and none for this one."""
        return not self.members

    @property
    def held_here(self) -> list[int]:
        """The members whose rows are up to date on this rank; each is so on one."""
        return self.held[self.ranks.block.index]

    def leave(self, members: Sequence[int], best: Mapping[str, Tensor]) -> None:
        """Go on with only these members of the whole ensemble, at least one.

        Args:
            members: Those of all ranks.
            best: The best weights of the members at home, which move with them.
        """
        if self.ranks.have_all:
            held = spread_evenly(self.held, members)
            if held != self.held:
                self.gather(best)
                self.held = held
        chosen = frozenset(members)
        own = [i for i in self.held_here if i in chosen]
        if own == self.members:
            return
        self.push()
        self.members = own
        self.home_optimizer.zero_grad()  # what stopped needs no gradients
        # A step of nobody: schedulers warn unless there was one before theirs.
        self.home_optimizer.step(active=[False] * len(self.home))
        if own:
            places = self.ranks.at_home(own)
            self.ens = self.home[places]
            self.ens.block = self._block(chosen)
            self.optimizer = self.home_optimizer.select(self.ens, places)
            self.ens._planner.keep_private(self.optimizer.state)
        self.gradients = self._summed()

    def pull(self) -> None:
        """Take over what was changed at home since `push`, hyperparameters too.

        Only a callback of the caller can have changed anything there.
        """
        if self.is_home or self.is_idle:
            return
        own, theirs = self.ens.stacked_tensors(), self.home.stacked_tensors()
        places = self.ranks.at_home(self.members)
        copy_rows(own, range(len(places)), theirs, places)
        _copy_shared(self.ens, self.home)
        self.optimizer.take(self.home_optimizer, places)

    def take_hyperparameters(self) -> None:
        """Take over what a scheduler has changed at home."""
        if not (self.is_home or self.is_idle):
            self.optimizer.take_hyperparameters(
                self.home_optimizer, self.ranks.at_home(self.members)
            )

    def go_ahead(self) -> None:
        """From now on the copies are trained; `push` brings what they become home."""
        self._is_ahead = not (self.is_home or self.is_idle)

    def push(self) -> None:
        """Bring the rows of the members that train, and what all share, home if they are ahead."""
        if not self._is_ahead:
            return
        self._is_ahead = False
        own, theirs = self.ens.stacked_tensors(), self.home.stacked_tensors()
        places = self.ranks.at_home(self.members)
        copy_rows(theirs, places, own, range(len(places)))
        _copy_shared(self.home, self.ens)
        self.home_optimizer.write_back(self.optimizer, places)

    @torch.no_grad()
    def gather(self, best: Mapping[str, Tensor]) -> None:
        """Bring the rows of all members up to date on every rank that has them at home.

        Args:
            best: The best weights of the members at home; their rows are gathered too.
        """
        self.push()
        group = self.ranks.group
        if group is None or not self.ranks.have_all:
            return
        shared = shared_tensors(self.home)
        ids = {id(tensor) for tensor in shared.values()}
        states = [s for (parameter, _), s in states_of(self.home_optimizer) if parameter not in ids]
        tensors = [*self.home.stacked_tensors().values(), *states, *best.values()]
        gather_members(tensors, self.held, self.ranks.block.index, group)
        for tensor in shared.values():
            tensor.copy_(broadcast_first(tensor, group))

    def _block(self, members: Collection[int]) -> Block | None:
        """The place of this rank's share among those that train."""
        if self.ranks.is_alone:
            return None
        sizes = [len([i for i in own if i in members]) for own in self.held]
        index = self.ranks.block.index
        return replace(
            self.ranks.block, num_members=sum(sizes), first=sum(sizes[:index]), size=sizes[index]
        )

    def _summed(self) -> SummedGradients | None:
        block = self.ranks.block
        return SummedGradients(self.ens, block) if is_summed(self.ens, block) else None


@torch.no_grad()
def _copy_shared(target: Ensemble, source: Ensemble) -> None:
    theirs = shared_tensors(source)
    for name, tensor in shared_tensors(target).items():
        tensor.copy_(theirs[name])


def shared_tensors(ens: Ensemble) -> dict[str, Tensor]:
    """The tensors that are kept once for all members, by name."""
    named = [*ens.members.named_parameters(), *ens.members.named_buffers()]
    return {name: tensor for name, tensor in named if name in ens.shared}


def states_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """The tensors of an optimizer's state, by the id of the parameter and the name."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield (id(parameter), key), value
