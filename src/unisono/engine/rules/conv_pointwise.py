"""Convolutions whose filters see one position at a time: matrix products of all members at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import members_first

# Measured on 2 AVX-512 cores: faster as a product than in groups up to here, about equal for more.
_MOST: Final = 2048  # positions of a member's minibatch


def pointwise(
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    stride: Sequence[int],
    padding: Sequence[int] | str,
) -> Tensor | None:
    """``y[i] = weight[i] @ x[i] + bias[i]`` at each position; None where it isn't that.

    Shape:
        - x: (N, B, C, *)
        - weight: (N, O, C, 1, ...)
        - bias: (N, O)
        - returns: (B, N, O, *)
    """
    values, filters = members_first(x), members_first(weight)
    if (
        math.prod(filters.shape[3:]) != 1
        or not (isinstance(padding, str) or not any(padding))
        or values.device.type != "cpu"
        or torch.compiler.is_exporting()  # the size of a batch may not be fixed
        or values.dtype not in (torch.float32, torch.float64)
        or values.dtype != filters.dtype
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    if any(step != 1 for step in stride):
        steps = tuple(stride) * (1 if len(stride) > 1 else filters.dim() - 3)
        for axis, step in enumerate(steps, start=3):
            values = values[(slice(None),) * axis + (slice(None, None, step),)]
    _, batch, _, *positions = values.shape
    if batch * math.prod(positions) > _MOST:
        return None
    columns = values.transpose(1, 2).flatten(2)  # (N, C, B * positions)
    if bias is None:
        y = torch.bmm(filters.flatten(2), columns)
    else:
        y = torch.baddbmm(members_first(bias).unsqueeze(2), filters.flatten(2), columns)
    del columns  # before there is another copy
    return y.reshape(*y.shape[:2], batch, *positions).movedim(2, 0).contiguous()
