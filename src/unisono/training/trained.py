"""What came of an epoch on each rank, and of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unisono.errors import EnsembleError
from unisono.training.history import Array


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of an epoch on one rank.

    Args:
        losses: The mean losses of its members; of replicas, each one's part of them.
        finite: Whether losses and parameters are numbers.
        rows: How many rows each has seen; None if nobody trained.

    Shape:
        - losses, finite: (n) for n members that train
    """

    losses: Array
    finite: Array
    rows: int | None

    def to_numbers(self, rates: Array, width: int) -> Array:
        """As numbers, as many on all ranks.

        Args:
            rates: The learning rates of the members whose rows are up to date on this rank.
            width: How many members these are at most, on any rank.

        Shape:
            - rates: (m)
            - returns: (1 + 3 width)
        """
        table = np.zeros((3, width))
        for row, values in zip(table, (self.losses, self.finite, rates), strict=True):
            row[: len(values)] = values
        return np.append(-1.0 if self.rows is None else self.rows, table)


def outcome_of_all(
    epoch: int, found: Sequence[Array], held: Sequence[Sequence[int]], computed: Sequence[int]
) -> tuple[Array, Array, Array]:
    """Each member's mean loss, NaN if it didn't train; whether all is numbers; its learning rate.

    Args:
        epoch: Its number, for the message.
        found: What `Trained.to_numbers` gave on each rank, in the order of their places.
        held: For each block the members whose rows are up to date there.
        computed: The members that train.

    Raises:
        EnsembleError: If the ranks saw different numbers of rows; on all ranks alike.

    Shape:
        - all: (N)
    """
    _check_rows(epoch, [None if own[0] < 0 else int(own[0]) for own in found])
    n = sum(map(len, held))
    losses, finite, rates = np.full(n, np.nan), np.ones(n, bool), np.empty(n)
    train = frozenset(computed)
    for replicas, here in zip(np.array_split(np.array(found), len(held)), held, strict=True):
        tables = replicas[:, 1:].reshape(len(replicas), 3, -1)
        members = [i for i in here if i in train]
        losses[members] = tables[:, 0, : len(members)].sum(0)
        finite[members] = tables[:, 1, : len(members)].all(0)
        rates[list(here)] = tables[0, 2, : len(here)]
    return losses, finite, rates


def _check_rows(epoch: int, rows: Sequence[int | None]) -> None:
    """Raise, on all ranks alike, if their loaders gave different numbers of rows."""
    if len({count for count in rows if count is not None}) > 1:
        raise EnsembleError(
            f"fit: members on all ranks see the same data, but in epoch {epoch} the ranks saw"
            f" {', '.join(map(str, rows))} rows; let the loader give every rank all rows, or pass"
            f" mesh=None to train an ensemble of its own on each"
        )
