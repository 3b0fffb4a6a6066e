"""``aten::linear``: one ``baddbmm`` over the member axis."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import for_each_member, members_first


def linear(n: int, x: Operand, weight: Operand, bias: Operand | None = None) -> Operand | None:
    """``y[i] = x[i] @ weight[i].T + bias[i]``; x: (N, *, in) -> (N, *, out).

    A shared ``x`` is not copied: ``baddbmm`` reads it N times through a stride of 0, which on a
    CPU beats one wide product with ``weight`` seen as (N * out, in). Torch's own rule splits the
    bias off, and for an ``x`` that is not contiguous copies the weight once per row of ``x``.
    """
    bias_is_stacked = bias is not None and bias[1] is not None
    if weight[1] is None and not bias_is_stacked:
        # One weight for all members: the member axis is one more batch axis.
        y = F.linear(members_first(x), weight[0], None if bias is None else bias[0])
        return y, None if x[1] is None else 0
    if weight[1] is None or weight[0].dim() != 3:
        return None
    w = members_first(weight)  # (N, out, in)
    if x[1] is None and torch.compiler.is_exporting():
        return _as_one(n, x[0], w, bias)
    # prod, because Size.numel() fixes the size of a batch inside torch.compile
    if x[1] == 0 and x[0].dim() == 3:  # the common case, without detours
        rows, batch_shape = x[0], None
    elif x[1] is None:
        batch_shape = x[0].shape[:-1]
        rows = x[0].reshape(prod(batch_shape), x[0].shape[-1]).expand(n, -1, -1)  # no copy
    else:
        x_first = members_first(x)
        batch_shape = x_first.shape[1:-1]
        rows = x_first.reshape(n, prod(batch_shape), x_first.shape[-1])  # (N, M, in)
    if bias is None:
        y = torch.bmm(rows, w.mT)  # (N, M, out)
    else:
        b = members_first(bias)
        y = torch.baddbmm(b.unsqueeze(1) if bias_is_stacked else b, rows, w.mT)
    if batch_shape is None or len(batch_shape) == 1:
        return y, 0
    return y.view(n, *batch_shape, w.shape[1]), 0


def _as_one(n: int, x: Tensor, weight: Tensor, bias: Operand | None) -> Operand:
    """One product with all members' weights; other runtimes copy an ``x`` that is read N times."""
    b = None if bias is None else for_each_member(bias, n).flatten()
    y = F.linear(x, weight.flatten(0, 1), b)  # (*, N * out)
    own = y.view(*y.shape[:-1], n, weight.shape[1]).movedim(-2, 0)
    return own.contiguous(), 0  # forward may look at it with view
