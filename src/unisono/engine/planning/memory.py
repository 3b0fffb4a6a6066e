"""How much memory a call takes, and how many members fit into a limit at once."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unisono.engine.axis import TorchDispatchMode
from unisono.engine.tree import leaves


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that ops allocate inside its ``with`` block.

    What was there before (parameters, inputs) doesn't count; what a kernel takes and gives back
    before it returns isn't seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self.live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = {_storage(leaf) for _, leaf in leaves([args, kwargs]) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        for _, leaf in leaves(result):
            if isinstance(leaf, Tensor):
                self._take(leaf, before)
        return result

    def _take(self, tensor: Tensor, before: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = _storage(tensor)
        if key in self._known or key in before:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._give_back, key, size).atexit = False

    def _give_back(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


class Footprint(NamedTuple):
    """Bytes that a call allocates."""

    peak: int  # the most at one time
    kept: int  # while its outputs live: they, and what backward needs
    outputs: int


def footprint(run: Callable[[], Any]) -> Footprint:
    """What ops inside ``run`` allocate, beside what was there before."""
    with PeakMemory() as memory:
        result = run()
        tensors = [leaf for _, leaf in leaves(result) if isinstance(leaf, Tensor)]
        return Footprint(memory.peak, memory.live, sum(t.nbytes for t in tensors))


def fitting_chunk(n: int, limit: int, of_one: Footprint, of_two: Footprint) -> tuple[int, int]:
    """The largest number of members at a time that stays within a limit, and the bytes it takes.

    A call takes a fixed part, a part that every member keeps, a part that only the members that
    run at the moment need, and, where there are several passes, a copy of the outputs to join
    them. Two footprints tell these parts. If even one member at a time takes more than the
    limit, it is one.

    Args:
        n: Number of members.
        limit: Bytes that a call may take.
        of_one: Footprint of one member.
        of_two: Footprint of two members at once.
    """
    kept = of_two.kept - of_one.kept
    moving = max(0, of_two.peak - of_one.peak - kept)
    fixed = max(0, of_one.peak - kept - moving)

    def bytes_of(size: int) -> int:
        joined = of_one.outputs * n if size < n else 0
        return fixed + moving * size + kept * n + joined

    fitting = (size for size in range(n, 0, -1) if bytes_of(size) <= limit)
    size = next(fitting, 1)
    return size, bytes_of(size)


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
