"""Ranks that go through the same steps: each hears at once when another fails or ends early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from unisono.collectives import place_of_flags
from unisono.training.ranks import ElsewhereError

_STEP, _END, _FAILURE = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
_KINDS: Final = len(_STEP)


class InStep:
    """Keeps ranks in step, so that none waits in a collective that another never comes to.

    Args:
        group: The ranks; None for all.
        num_marks: How many marks each of them gives with each step.

    Example:
        On every rank, before what they do together in each step::

            with in_step.until_end():
                for batch in batches:
                    found = compute(batch)
                    in_step.next()
                    all_sum(found, group)
    """

    def __init__(self, group: ProcessGroup | None, num_marks: int = 0) -> None:
        self._group = group
        self._no_marks = [0] * num_marks
        self._device = place_of_flags(group)

    def next(self, marks: Sequence[bool] = ()) -> list[bool]:
        """One step more; for each mark whether any rank has set it.

        Raises:
            ElsewhereError: If another rank failed, or has no more steps.
        """
        found = self._all([*_STEP, *map(int, marks)])
        if found[1]:
            raise ElsewhereError("it has more minibatches in an epoch than another rank")
        return found[_KINDS:]

    @contextmanager
    def until_end(self) -> Iterator[None]:
        """The steps happen in here; their end is one of all ranks, too.

        Raises:
            ElsewhereError: As for `next`.
        """
        try:
            yield
        except ElsewhereError:
            raise
        except Exception:
            self._all([*_FAILURE, *self._no_marks])
            raise
        if self._all([*_END, *self._no_marks])[0]:
            raise ElsewhereError("it has fewer minibatches in an epoch than another rank")

    def _all(self, own: Sequence[int]) -> list[bool]:
        flags = torch.tensor(own, device=self._device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, self._group)
        found = [bool(flag) for flag in flags.tolist()]
        if found[2] and not own[2]:
            raise ElsewhereError
        return found
