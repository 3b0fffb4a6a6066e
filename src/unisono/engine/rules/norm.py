"""``aten::batch_norm``: the channels of all members normalised in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import folded, members_first, unfolded


def batch_norm(
    n: int,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    running_mean: Operand | None,
    running_var: Operand | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Operand | None:
    """``y[i] = (x[i] - mean[i]) / sqrt(var[i] + eps) * weight[i] + bias[i]``.

    x: (N, B, C, *) is seen as (B, N * C, *), with affine parameters and running statistics of
    all members inside the one kernel; the statistics are written in place through their view.
    """
    mean, var = running_mean, running_var
    options = (training, momentum, eps, cudnn_enabled)
    operands = (x, weight, bias, mean, var)
    if all(operand is None or operand[1] is None for operand in operands):
        plain = (None if operand is None else operand[0] for operand in operands)
        return torch.ops.aten.batch_norm(*plain, *options), None
    if training and not all(s is None or _flattens_to_view(s) for s in (mean, var)):
        return None  # the update would be lost in a copy; torch says what is wrong
    per_channel = (
        None if operand is None else folded(operand, 0, n) for operand in (weight, bias, mean, var)
    )
    y: Tensor = torch.ops.aten.batch_norm(folded(x, 1, n), *per_channel, *options)  # (B, N * C, *)
    return unfolded(y, 1, n), 1


def _flattens_to_view(statistic: Operand) -> bool:
    """Whether (N, C) can be seen as (N * C) without a copy."""
    return statistic[1] is not None and members_first(statistic).is_contiguous()
