"""How many bytes a process hands to collectives: what is in a message, not how it travels.

A ring passes on ``2 (R - 1) / R`` times the bytes of an all-reduce among R ranks, and ``R - 1``
times those of an all-gather. `torch.distributed.tensor.debug.CommDebugMode` sees the same calls,
and counts them without their sizes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from torch import Tensor

# As `CommDebugMode` is one: torch has no public way to see collectives.
from torch.utils._python_dispatch import TorchDispatchMode

# Where each of them has what this rank contributes.
_PLACE: Final = {
    "c10d::allreduce_": 0,
    "c10d::broadcast_": 0,
    "c10d::allgather_": 1,
    "c10d::_allgather_base_": 1,
    "c10d::reduce_scatter_": 1,
    "c10d::_reduce_scatter_base_": 1,
    "c10d::alltoall_base_": 1,
}


class CollectiveBytes(TorchDispatchMode):
    """Counts while it is entered, those of backward passes too.

    Attributes:
        sent: Operation -> bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Of all operations."""
        return sum(self.sent.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name
            self.sent[name.removeprefix("c10d::").strip("_")] += _bytes(args[_PLACE[name]])
        return func(*args, **(kwargs or {}))


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors))
