"""The parameters of one step that can be updated together, and how their memory is cut up."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unisono.optim.hyperparameters import Array, Values


@dataclass(frozen=True)
class Batch:
    """Parameters on one device, of one dtype, whose members stand at the same steps.

    Args:
        parameters: The parameters.
        gradients: One for each.
        state: For each key of the state one tensor for each parameter.
        steps: The number of steps that each member has done.
        values: The hyperparameters.
        key: By which something made for these tensors is found again in the next step; None if
            they won't come again.

    Shape:
        - parameters, gradients, state: (N, *)
        - steps: (N)
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, list[Tensor]]
    steps: Array
    values: Values
    key: Hashable | None = None

    @property
    def num_members(self) -> int:
        """N, or 1 for parameters that all members share."""
        return len(self.steps)

    @property
    def elements(self) -> int:
        """The number of elements of one member."""
        return sum(p.numel() for p in self.parameters) // self.num_members

    @property
    def tensors(self) -> list[Tensor]:
        """What is read and written in each step, but for the gradients."""
        return [*self.parameters, *(t for tensors in self.state.values() for t in tensors)]

    def members(self, indices: Sequence[int], dtype: torch.dtype | None) -> Batch:
        """Copies of some members' rows, in another dtype if it isn't None; see `put_back`."""
        rows = torch.tensor(indices, device=self.parameters[0].device)

        def take(tensors: list[Tensor]) -> list[Tensor]:
            return [tensor.index_select(0, rows).to(dtype or tensor.dtype) for tensor in tensors]

        return Batch(
            take(self.parameters),
            take(self.gradients),
            {key: take(tensors) for key, tensors in self.state.items()},
            self.steps[indices],
            self.values.of(indices),
        )

    def put_back(self, indices: Sequence[int], updated: Batch) -> None:
        """Write what `members` has copied, and what was made of it, into the rows."""
        rows = torch.tensor(indices, device=self.parameters[0].device)
        for tensor, new in zip(self.tensors, updated.tensors, strict=True):
            tensor.index_copy_(0, rows, new.to(tensor.dtype))


def is_in_order(tensor: Tensor, like: Tensor) -> bool:
    """Whether a tensor of the same shape lies in memory in the same order, without gaps."""
    order, wanted = tensor.stride(), like.stride()
    if order == wanted:
        return True
    triples = zip(order, wanted, like.shape, strict=True)
    return all(a == b for a, b, size in triples if size > 1)


def in_order(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with the dtype, the device and the order in memory of ``like``."""
    if tensor.dtype == like.dtype and tensor.device == like.device and is_in_order(tensor, like):
        return tensor
    return torch.empty_like(like).copy_(tensor)


def as_stored(tensor: Tensor, like: Tensor) -> Tensor:
    """A contiguous view of a tensor that is `is_in_order`: its axes as they lie in memory.

    torch's fused kernels copy what isn't contiguous, and to a kernel that treats all elements
    alike it makes no difference which axis is which.
    """
    if like.is_contiguous():
        return tensor
    return tensor.permute(sorted(range(like.dim()), key=like.stride, reverse=True))


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, (*) -> (*, 2); others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


class Memory:
    """What was made of the memory of some tensors, as long as they stay where they are."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[list[Any], list[Any], Any]] = {}

    def recall(self, key: Hashable, tensors: Sequence[Tensor]) -> Any:
        """What was remembered under this key, or None if one of the tensors has moved since."""
        found = self._kept.get(key)
        return found[2] if found is not None and found[0] == _places(tensors) else None

    def remember(self, key: Hashable, tensors: Sequence[Tensor], made: Any) -> None:
        """Remember what was made of these tensors; a little of it, not every key there was."""
        if len(self._kept) >= 32:
            self._kept.clear()
        storages = [tensor.untyped_storage() for tensor in tensors]  # so that no address returns
        self._kept[key] = (_places(tensors), storages, made)


def _places(tensors: Sequence[Tensor]) -> list[Any]:
    return [(id(t.untyped_storage()), t.storage_offset(), t.shape, t.stride()) for t in tensors]


def cuts(shape: Sequence[int], size: int | None) -> list[tuple[int, int]]:
    """Ranges of members with about ``size`` elements each; one range of all if it is None."""
    n = shape[0]
    if size is None:
        return [(0, n)]
    count = max(1, size // max(1, math.prod(shape[1:])))
    return [(a, min(n, a + count)) for a in range(0, n, count)]
