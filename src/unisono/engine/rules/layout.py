"""Where the member axis lies: moving it is a view, folding it into another axis may be one."""

from __future__ import annotations

from torch import Tensor

from unisono.engine.axis import Operand


def members_first(operand: Operand) -> Tensor:
    """The tensor with the member axis in front, as a view; as it is if it has none."""
    value, dim = operand
    return value.movedim(dim, 0) if dim else value


def for_each_member(operand: Operand, n: int) -> Tensor:
    """The tensor as (N, *); one that is the same for all members is repeated, without a copy."""
    value = members_first(operand)
    return value.expand(n, *value.shape) if operand[1] is None else value


def batch_lies_outside(x: Operand) -> bool:
    """Whether in memory the batch lies around the members: (B, N, *), as after a convolution."""
    value = members_first(x)
    return value.dim() > 1 and value.stride(0) < value.stride(1)


def folded(operand: Operand, dim: int, n: int) -> Tensor:
    """The tensor with its N members folded into axis ``dim``, members outermost.

    A tensor that is the same for all members is repeated. It is a view where the memory
    allows it, so chains of ops that fold into the same axis copy only at their entry.

    Shape:
        - (..., D, ...) per member, D at axis ``dim`` -> (..., N * D, ...)
    """
    value, member_dim = operand
    if member_dim is None:
        value = value.unsqueeze(dim)
        value = value.expand(*value.shape[:dim], n, *value.shape[dim + 1 :])
    elif member_dim != dim:
        value = value.movedim(member_dim, dim)
    return value.flatten(dim, dim + 1)


def unfolded(value: Tensor, dim: int, n: int) -> Tensor:
    """Undo `folded`, as a view: (..., N * D, ...) -> (..., N, D, ...)."""
    shape = value.shape
    return value.reshape(*shape[:dim], n, shape[dim] // n, *shape[dim + 1 :])
