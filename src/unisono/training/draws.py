"""Which rows each step of an epoch takes."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from unisono.training.kinds import Rows, Sampling


@dataclass(frozen=True)
class Draws:
    """The rows of a data set that each step takes for each member; pure.

    Args:
        sampling: Which rows a member sees, and in which order.
        num_rows: Number of rows of the data.
        num_members: Number of members of the whole ensemble.
        seed: Seed of all orders.
        sizes: Rows of each minibatch, as one member sees them.
    """

    sampling: Sampling
    num_rows: int
    num_members: int
    seed: int
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not _is_integer(self.seed) or self.seed < 0:
            raise ValueError(f"sampling: seed is an integer, not negative; got {self.seed!r}")

    def steps(self, epoch: int, members: Sequence[int]) -> Iterator[Rows]:
        """The rows of each minibatch, in order.

        Args:
            epoch: Number of the epoch, counted from 0.
            members: Indices of the members that train, in the whole ensemble.

        Shape:
            - each: (N, B) for ``N = len(members)``; (1, B) where they share it
        """
        order = self.sampling.order(
            self.num_rows, members, epoch, seed=self.seed, num_members=self.num_members
        )
        if self.sampling.is_shared:
            order = order[:1]
        ends = np.cumsum(self.sizes)
        return (order[:, end - size : end] for size, end in zip(self.sizes, ends, strict=True))

    def held_out(self) -> tuple[Rows, ...]:
        """The rows that each member of the whole ensemble never sees."""
        return tuple(
            self.sampling.held_out(
                self.num_rows, member, seed=self.seed, num_members=self.num_members
            )
            for member in range(self.num_members)
        )


def split_evenly(num_rows: int, batch_size: int | None) -> tuple[int, ...]:
    """Return the sizes of an epoch's minibatches, ``ceil(num_rows / batch_size)`` of them.

    They differ by one row at most, instead of one small rest at the end: batch norm dislikes a
    tiny batch, and fewer shapes mean fewer plans to measure.

    Args:
        num_rows: Rows of an epoch.
        batch_size: Rows of a minibatch, at most; None for all.

    Example:
        >>> split_evenly(10, 4), split_evenly(3, 4), split_evenly(3, None)
        ((4, 3, 3), (3,), (3,))
    """
    if batch_size is None:
        return (num_rows,)
    count = math.ceil(num_rows / batch_size)
    small, larger = divmod(num_rows, count)
    return (small + 1,) * larger + (small,) * (count - larger)


def split_with_rest(num_rows: int, batch_size: int, *, drop_last: bool) -> tuple[int, ...]:
    """Return the sizes of the minibatches that a `DataLoader` makes.

    Args:
        num_rows: Rows of an epoch.
        batch_size: Rows of each minibatch but the last one.
        drop_last: Whether to leave out the smaller rest.

    Raises:
        ValueError: If nothing is left.

    Example:
        >>> split_with_rest(10, 4, drop_last=False), split_with_rest(10, 4, drop_last=True)
        ((4, 4, 2), (4, 4))
    """
    full, rest = divmod(num_rows, batch_size)
    if full == 0 and drop_last:
        raise ValueError(
            f"data: the loader has batch_size={batch_size} and drop_last=True, so the {num_rows}"
            f" rows of an epoch make no minibatch; give it a batch_size of at most {num_rows}"
        )
    return (batch_size,) * full + ((rest,) if rest and not drop_last else ())


def check_batch_size(batch_size: Any) -> int | None:
    """Return it as an integer, or raise unless it is one above zero, or None."""
    if batch_size is None:
        return None
    if _is_integer(batch_size) and batch_size > 0:
        return operator.index(batch_size)
    raise ValueError(
        f"batch_size is a positive number of rows, or None for all of them; got {batch_size!r}"
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, SupportsIndex) and not isinstance(value, bool)
