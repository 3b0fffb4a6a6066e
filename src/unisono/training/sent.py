"""Numbers of this rank on their way to all ranks, while it works on."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from unisono.collectives import place_of_flags
from unisono.training.history import Array
from unisono.training.ranks import Ranks, answers, raise_any, told


class Sent:
    """What this rank has made of some work, sent to all; `wait` gives what all have made of it.

    Args:
        ranks: The ranks.
        numbers: As many on all ranks.
        error: Why this rank has none that count.

    Shape:
        - numbers: (n)
    """

    def __init__(self, ranks: Ranks, numbers: Array, error: Exception | None) -> None:
        self._ranks = ranks
        self._error = error
        own = torch.from_numpy(np.array([ranks.block.place, error is not None, *numbers], float))
        self._found = [own]
        self._work = None
        if not ranks.is_alone:
            own = own.to(place_of_flags(None))
            self._found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            with answers():
                self._work = dist.all_gather(self._found, own, async_op=True)

    def wait(self) -> list[Array]:
        """The numbers of each rank, in the order of their places.

        Raises:
            EnsembleError: If only other ranks have an error; it names them.
            Exception: This rank's own error.
        """
        if self._work is not None:
            with answers():
                self._work.wait()
        rows = torch.stack(self._found).cpu().numpy()
        place, has_failed, numbers = rows[:, 0], rows[:, 1], rows[:, 2:]
        if has_failed.any():
            raise_any(self._error, self._ranks.gather(told(self._error)))
        return list(numbers[place.argsort()])
