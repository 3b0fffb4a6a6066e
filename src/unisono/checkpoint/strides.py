"""The order of a tensor's elements in memory, kept beside its values.

Whether a run can be repeated bit by bit depends on the order of its weights in memory, and how
fast it is, too. A file holds every tensor in the order of its shape, and the strides beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

_LIMIT: Final = 2**62  # what torch takes for a stride, with room to multiply


def noted_strides(tensor: Tensor) -> list[int] | None:
    """The strides to keep of a tensor; None if they are those of a new one of its shape."""
    if tensor.numel() == 0 or not _is_dense(tensor.shape, tensor.stride()):
        return None
    # Also those of axes of length 1: convolutions tell the order that is meant by them.
    strides = tuple(tensor.stride())
    return None if strides == _in_order(tuple(tensor.shape)) else list(strides)


def strides_of_rows(shape: Sequence[int], strides: Sequence[int] | None, rows: int) -> list[int]:
    """The strides of a tensor with other rows: those that were kept, if the rows are outermost.

    Args:
        shape: The shape that the strides were kept of.
        strides: What `noted_strides` gave.
        rows: Length of axis 0 of the new tensor; the others stay.

    Raises:
        ValueError: If such strides don't give each element a place of its own.
    """
    new = (rows, *shape[1:]) if shape else ()
    if strides is None:
        return list(_in_order(new))
    if len(strides) != len(shape) or not _is_dense(shape, strides):
        raise ValueError(f"shape {tuple(shape)} can't have the strides {list(strides)}")
    if rows == shape[0]:
        return list(strides)
    # The stride of a single row may be anything. With more of them it would leave gaps.
    is_outermost = strides[0] >= max(strides) and _is_dense(new, strides)
    return list(strides) if is_outermost else list(_in_order(new))


def _in_order(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(torch.empty(tuple(shape), device="meta").stride())


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the elements fill one piece of memory, each with a place of its own."""
    if not all(0 <= stride < _LIMIT for stride in strides):
        return False  # axes of length 0 and 1 may have any other
    expected = 1
    for step, size in sorted((t, s) for t, s in zip(strides, shape, strict=True) if s > 1):
        if step != expected:
            return False
        expected *= size
    return True
