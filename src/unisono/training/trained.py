"""What came of an epoch on each rank, and of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unisono.block import Block
from unisono.errors import EnsembleError
from unisono.training.history import Array


@dataclass(frozen=True, eq=False)
class Trained:
    """What came of an epoch on one rank.

    Args:
        members: Those that trained there.
        losses: Their mean losses; of replicas, each one's part of them.
        finite: Whether losses and parameters are numbers.
        rows: How many rows each has seen; None if nobody trained.

    Shape:
        - losses, finite: (n) for n members
    """

    members: list[int]
    losses: Array
    finite: Array
    rows: int | None


def losses_of_all(epoch: int, found: Sequence[Trained], block: Block) -> tuple[Array, Array]:
    """Each member's mean loss, NaN if it didn't train, and whether all is numbers.

    Args:
        epoch: Its number, for the message.
        found: Of each rank, in the order of their places.
        block: The place of this one.

    Raises:
        EnsembleError: If the ranks saw different numbers of rows; on all ranks alike.

    Shape:
        - both: (N)
    """
    _check_rows(epoch, [each.rows for each in found])
    losses = np.full(block.num_members, np.nan)
    finite = np.ones(block.num_members, bool)
    for start in range(0, len(found), block.num_replicas):
        replicas = found[start : start + block.num_replicas]
        losses[replicas[0].members] = sum(each.losses for each in replicas)
        finite[replicas[0].members] = np.all([each.finite for each in replicas], axis=0)
    return losses, finite


def _check_rows(epoch: int, rows: Sequence[int | None]) -> None:
    """Raise, on all ranks alike, if their loaders gave different numbers of rows."""
    if len({count for count in rows if count is not None}) > 1:
        raise EnsembleError(
            f"fit: members on all ranks see the same data, but in epoch {epoch} the ranks saw"
            f" {', '.join(map(str, rows))} rows; let the loader give every rank all rows, or pass"
            f" mesh=None to train an ensemble of its own on each"
        )
