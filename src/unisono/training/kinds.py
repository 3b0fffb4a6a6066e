"""The kinds of `Sampling`: which rows of the data each member sees, and in which order.

Pure functions on index arrays. Each member has a stream of random numbers of its own in each
epoch: numpy's ``default_rng(SeedSequence(seed, spawn_key=(purpose, member, epoch)))``. So member i
sees the same rows in an ensemble of 5 and of 50, whatever the other members are, and epoch k
doesn't need the epochs before it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unisono.training.streams import Purpose, stream

Rows: TypeAlias = NDArray[np.int64]


class Sampling(ABC):
    """Which rows each member trains on, and in which order; made by the functions of `sampling`.

    ``held_out`` is what ``rows`` leaves out, and each epoch runs through ``rows`` in an order of
    its own. All methods are pure: equal arguments give equal results.

    Example:
        >>> from unisono.training import sampling
        >>> halves = sampling.folds(2)
        >>> train = halves.rows(10, 0, seed=0, num_members=2)
        >>> test = halves.held_out(10, 0, seed=0, num_members=2)
        >>> len(train), len(test), set(train.tolist()) & set(test.tolist())
        (5, 5, set())
    """

    is_shared: ClassVar[bool] = False

    def __str__(self) -> str:
        """How it is written: ``sampling.folds(k=5)``."""
        text = repr(self)
        return f"sampling.{text[0].lower()}{text[1:]}"

    @abstractmethod
    def _rows_of(
        self, num_rows: int, members: Sequence[int], seed: int, num_members: int
    ) -> Iterator[Rows]:
        """The rows of each member, as arrays that the caller may write to."""

    @abstractmethod
    def rows_per_epoch(self, num_rows: int, *, num_members: int) -> int:
        """How many rows an epoch has, the same for all members.

        Args:
            num_rows: Number of rows of the data.
            num_members: Number of members of the whole ensemble.

        Raises:
            ValueError: If there are too few of them for this kind.
        """

    def check(self, num_rows: int, *, num_members: int) -> None:
        """Raise unless members can be given rows of data of this length.

        Args:
            num_rows: Number of rows of the data.
            num_members: Number of members of the whole ensemble.

        Raises:
            ValueError: If there are no rows, no members, or too few for this kind.
        """
        if num_rows < 1 or num_members < 1:
            raise ValueError(
                f"sampling: members train on rows of the data, so there is at least one of each;"
                f" got {num_rows} rows and {num_members} members"
            )
        self.rows_per_epoch(num_rows, num_members=num_members)

    def rows(self, num_rows: int, member: int, *, seed: int, num_members: int) -> Rows:
        """Return the rows that a member trains on, a row drawn twice twice.

        Args:
            num_rows: Number of rows of the data.
            member: Index of the member in the whole ensemble.
            seed: The seed of all members.
            num_members: Number of members of the whole ensemble; it matters to
                ``folds(k=None)`` alone.

        Returns:
            The indices, in no particular order.

        Shape:
            - returns: (rows,)

        Raises:
            ValueError: If there is no such member, or it can't be given rows.
        """
        self._check_all(num_rows, [member], 0, seed, num_members)
        return next(iter(self._rows_of(num_rows, [member], seed, num_members)))

    def held_out(self, num_rows: int, member: int, *, seed: int, num_members: int) -> Rows:
        """Return the rows that a member never sees: out of its bag, its fold, the rest.

        Args:
            num_rows: Number of rows of the data.
            member: Index of the member in the whole ensemble.
            seed: The seed of all members.
            num_members: Number of members of the whole ensemble.

        Returns:
            The indices, ascending.

        Shape:
            - returns: (rows,)

        Raises:
            ValueError: If there is no such member, or it can't be given rows.
        """
        unseen = np.ones(num_rows, dtype=np.bool_)
        unseen[self.rows(num_rows, member, seed=seed, num_members=num_members)] = False
        return np.flatnonzero(unseen)

    def order(
        self, num_rows: int, members: Sequence[int], epoch: int, *, seed: int, num_members: int
    ) -> Rows:
        """Return the order in which members see their rows in one epoch.

        Args:
            num_rows: Number of rows of the data.
            members: Indices of the members that train, in the whole ensemble.
            epoch: Number of the epoch, counted from 0.
            seed: The seed of all members.
            num_members: Number of members of the whole ensemble.

        Returns:
            The indices; for `shared` a read-only view of one order.

        Shape:
            - returns: (len(members), rows), member ``members[j]`` in row j

        Raises:
            ValueError: If there is no such member, or it can't be given rows.
        """
        self._check_all(num_rows, members, epoch, seed, num_members)
        if self.is_shared:
            common = stream(seed, Purpose.COMMON_ORDER, epoch=epoch).permutation(num_rows)
            return np.broadcast_to(common, (len(members), num_rows))
        count = self.rows_per_epoch(num_rows, num_members=num_members)
        orders = np.empty((len(members), count), dtype=np.int64)
        chosen = self._rows_of(num_rows, members, seed, num_members)
        for own, member, rows in zip(orders, members, chosen, strict=True):
            stream(seed, Purpose.ORDER, member, epoch).shuffle(rows)
            own[:] = rows[:count]
        return orders

    def _check_all(
        self, num_rows: int, members: Sequence[int], epoch: int, seed: int, num_members: int
    ) -> None:
        self.check(num_rows, num_members=num_members)
        if len(members) == 0:
            raise ValueError("sampling: there is no member to give rows to")
        wrong = [member for member in members if not 0 <= member < num_members]
        if wrong:
            raise ValueError(f"sampling: members are 0 to {num_members - 1}; got {wrong}")
        if epoch < 0 or seed < 0:
            raise ValueError(
                f"sampling: epoch and seed aren't negative; got epoch={epoch}, seed={seed}"
            )


@dataclass(frozen=True)
class Shared(Sampling):
    """See `shared`."""

    is_shared: ClassVar[bool] = True

    def _rows_of(
        self, num_rows: int, members: Sequence[int], seed: int, num_members: int
    ) -> Iterator[Rows]:
        return (np.arange(num_rows) for _ in members)

    def rows_per_epoch(self, num_rows: int, *, num_members: int) -> int:
        """All of them."""
        return num_rows


@dataclass(frozen=True)
class Shuffled(Sampling):
    """See `shuffled`."""

    def _rows_of(
        self, num_rows: int, members: Sequence[int], seed: int, num_members: int
    ) -> Iterator[Rows]:
        return (np.arange(num_rows) for _ in members)

    def rows_per_epoch(self, num_rows: int, *, num_members: int) -> int:
        """All of them."""
        return num_rows


@dataclass(frozen=True)
class Bootstrap(Sampling):
    """See `bootstrap`."""

    def _rows_of(
        self, num_rows: int, members: Sequence[int], seed: int, num_members: int
    ) -> Iterator[Rows]:
        return (stream(seed, Purpose.ROWS, i).integers(num_rows, size=num_rows) for i in members)

    def rows_per_epoch(self, num_rows: int, *, num_members: int) -> int:
        """As many as the data has."""
        return num_rows


@dataclass(frozen=True)
class Folds(Sampling):
    """See `folds`."""

    k: int | None = None

    def __post_init__(self) -> None:
        if self.k is not None and (type(self.k) is not int or self.k < 2):
            raise ValueError(
                f"sampling.folds: k is the number of folds, at least 2, or None for one per member;"
                f" got {self.k!r}"
            )

    def _rows_of(
        self, num_rows: int, members: Sequence[int], seed: int, num_members: int
    ) -> Iterator[Rows]:
        k = self._count(num_rows, num_members)
        fold = np.empty(num_rows, dtype=np.int64)
        fold[stream(seed, Purpose.FOLDS).permutation(num_rows)] = np.arange(num_rows) % k
        return (np.flatnonzero(fold != i % k) for i in members)

    def rows_per_epoch(self, num_rows: int, *, num_members: int) -> int:
        """All but those of the largest fold."""
        return num_rows - -(-num_rows // self._count(num_rows, num_members))

    def _count(self, num_rows: int, num_members: int) -> int:
        k = num_members if self.k is None else self.k
        if k < 2:
            raise ValueError(
                f"sampling.folds: one fold per member takes at least 2 members, got {num_members};"
                f" give the number of folds: sampling.folds(5)"
            )
        if k > num_rows:
            raise ValueError(
                f"sampling.folds: each fold has at least one row, but {num_rows} rows were to be"
                f" split into {k} folds; give a smaller number of them: sampling.folds(k)"
            )
        return k


@dataclass(frozen=True)
class Subset(Sampling):
    """See `subset`."""

    fraction: float

    def __post_init__(self) -> None:
        is_number = isinstance(self.fraction, int | float) and not isinstance(self.fraction, bool)
        if not is_number or not 0 < self.fraction <= 1:
            raise ValueError(
                f"sampling.subset: fraction is a part of the rows, above 0 and at most 1;"
                f" got {self.fraction!r}"
            )

    def _rows_of(
        self, num_rows: int, members: Sequence[int], seed: int, num_members: int
    ) -> Iterator[Rows]:
        size = self.rows_per_epoch(num_rows, num_members=num_members)
        return (
            stream(seed, Purpose.ROWS, i).choice(num_rows, size, replace=False, shuffle=False)
            for i in members
        )

    def rows_per_epoch(self, num_rows: int, *, num_members: int) -> int:
        """The fraction of them, rounded to the nearest number of rows, at least one."""
        return max(1, round(self.fraction * num_rows))
