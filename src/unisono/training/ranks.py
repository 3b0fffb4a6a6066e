"""The processes that train one ensemble together: where each stands, and how they hear of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from unisono.block import Block, split_members
from unisono.collectives import MEMBER
from unisono.describe import list_facts
from unisono.errors import EnsembleError

T = TypeVar("T")


class ElsewhereError(EnsembleError):
    """This rank can't go on because of another; without a text, that one tells what is wrong."""


@dataclass(frozen=True)
class Ranks:
    """The ranks that train one ensemble, seen from this one; a process alone is one rank.

    Args:
        block: The place of this rank among them.
        home: The members that the ensemble of the caller has on this rank: all, or the block's.
    """

    block: Block
    home: range

    @property
    def is_alone(self) -> bool:
        """Whether there is no other rank."""
        return self.block.mesh is None

    @property
    def is_first(self) -> bool:
        """Whether this rank shows and writes what all have."""
        return self.block.place == 0

    @property
    def have_all(self) -> bool:
        """Whether every rank has all members at home, and trains only its share of them."""
        return not self.is_alone and len(self.home) == self.block.num_members

    @property
    def have_blocks(self) -> bool:
        """Whether each rank has its own block at home, and no other members."""
        return not self.is_alone and not self.have_all

    @property
    def group(self) -> ProcessGroup | None:
        """The ranks with the other blocks; None for a process alone."""
        return None if self.block.mesh is None else self.block.mesh.get_group(MEMBER)

    def blocks(self) -> list[list[int]]:
        """The members of each block, as they are at first."""
        return [list(own) for own in split_members(self.block.num_members, self.block.num_blocks)]

    def at_home(self, members: Sequence[int]) -> list[int]:
        """Where these members stand in the ensemble of the caller."""
        return [i - self.home.start for i in members]

    def gather(self, value: T) -> list[T]:
        """What each rank has, in the order of their places.

        Args:
            value: Something small, which can be pickled.

        Raises:
            EnsembleError: If a rank doesn't answer.
        """
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * dist.get_world_size()
        with answers():
            dist.all_gather_object(found, (self.block.place, value))
        return [each for _, each in sorted(found, key=lambda pair: pair[0])]

    def first_replicas(self, found: Sequence[T]) -> Sequence[T]:
        """What `gather` gave, of one rank for each block."""
        return found[:: self.block.num_replicas]

    def together(self, work: Callable[[], T]) -> T:
        """Do something on each rank; if one can't, all raise.

        Raises:
            EnsembleError: If only other ranks have an error; it names them.
            Exception: This rank's own error.
        """
        if self.is_alone:
            return work()
        done, error = _tried(work)
        raise_any(error, self.gather(told(error)))
        return done[0]

    def collect(self, work: Callable[[], T]) -> list[T]:
        """The same for something small: what each rank has made of it, as `gather` gives it."""
        if self.is_alone:
            return [work()]
        done, error = _tried(work)
        found = self.gather((told(error), done))
        raise_any(error, [text for text, _ in found])
        return [value for _, own in found for value in own]


def alone(num_members: int) -> Ranks:
    """This process with all members."""
    return Ranks(Block(num_members, 0, num_members), range(num_members))


@contextmanager
def answers() -> Iterator[None]:
    """Say what it means where a collective in here fails.

    Raises:
        EnsembleError: If a rank doesn't answer.
    """
    try:
        yield
    except RuntimeError as error:
        raise EnsembleError(
            f"fit: rank {dist.get_rank()} has no answer from the others"
            f" ({str(error).partition(chr(10))[0]}): one of them has ended or hangs, or it was"
            f" slower by more than the timeout, which"
            f" mesh=unisono.distributed.make_mesh(timeout=...) sets"
        ) from error


def _tried(work: Callable[[], T]) -> tuple[list[T], Exception | None]:
    """What came of it, if anything did, and the error if not."""
    try:
        return [work()], None
    except Exception as error:
        return [], error


def raise_any(error: Exception | None, texts: Sequence[str | None]) -> None:
    """Raise this rank's error, or one that names what others have told."""
    if error is not None and not isinstance(error, ElsewhereError):
        raise error
    broken = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text is not None]
    if broken or error is not None:
        text = f"fit: not all ranks could go on:\n\n{list_facts(broken)}"
        raise EnsembleError(text) from error


def told(error: Exception | None) -> str | None:
    """An error as other ranks are told of it; None if there is none, or it came from them."""
    if isinstance(error, ElsewhereError):
        return str(error) or None
    return None if error is None else f"{type(error).__name__}: {error}"
