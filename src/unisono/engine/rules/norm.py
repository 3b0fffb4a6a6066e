"""The normalisations over channels: batch, instance and group norm, each in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import batch_lies_outside, folded, members_first, unfolded


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
    options = (training, momentum, eps, cudnn_enabled)
    per_channel = (weight, bias, running_mean, running_var)
    return _over_channels(torch.ops.aten.batch_norm, n, x, per_channel, training, options)


def instance_norm(
    n: int,
    x: Operand,
    weight: Operand | None,
    bias: Operand | None,
    running_mean: Operand | None,
    running_var: Operand | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Operand | None:
    """As `batch_norm`, with mean and variance of each example by itself.

    Torch's own rule repeats the affine parameters for each example, and applies them in two
    passes of their own.
    """
    options = (use_input_stats, momentum, eps, cudnn_enabled)
    per_channel = (weight, bias, running_mean, running_var)
    return _over_channels(torch.ops.aten.instance_norm, n, x, per_channel, use_input_stats, options)


def group_norm(
    n: int,
    x: Operand,
    num_groups: int,
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Operand | None:
    """Normalise over groups of channels; (N, B, C, *) -> (N, B, C, *).

    G groups of (N, B, C, *) are N * G groups of (B, N * C, *), affine parameters inside the one
    kernel. Where the batch doesn't lie outermost in memory, the members are more of the batch,
    and weight and bias take one more pass; two in torch's own rule.
    """
    if x[1] is not None and x[0].dim() > 2 and batch_lies_outside(x):
        w, b = (None if operand is None else folded(operand, 0, n) for operand in (weight, bias))
        y = torch.ops.aten.group_norm(folded(x, 1, n), n * num_groups, w, b, eps, cudnn_enabled)
        return unfolded(y, 1, n), 1
    if weight is None or bias is None or weight[1] is None or bias[1] is None:
        return None
    if x[1] is None:
        y = torch.ops.aten.group_norm(x[0], num_groups, None, None, eps, cudnn_enabled)
    else:
        y = torch.ops.aten.group_norm(folded(x, 0, n), num_groups, None, None, eps, cudnn_enabled)
        y = unfolded(y, 0, n)  # (N, B, C, *)
    rest = y.dim() - 2 if x[1] is None else y.dim() - 3
    w, b = (
        members_first(p)[(slice(None), None, slice(None), *[None] * rest)] for p in (weight, bias)
    )
    return torch.addcmul(b, y, w).to(y.dtype), 0


def _over_channels(
    norm: Any,
    n: int,
    x: Operand,
    per_channel: tuple[Operand | None, ...],
    writes_statistics: bool,
    options: tuple[object, ...],
) -> Operand | None:
    """Normalise (B, N * C, *) with weight, bias and two statistics of (N * C)."""
    if all(operand is None or operand[1] is None for operand in (x, *per_channel)):
        plain = (None if operand is None else operand[0] for operand in per_channel)
        return norm(x[0], *plain, *options), None
    statistics = per_channel[2:]
    if writes_statistics and not all(s is None or _flattens_to_view(s) for s in statistics):
        return None  # the update would be lost in a copy; torch says what is wrong
    flat = (None if operand is None else folded(operand, 0, n) for operand in per_channel)
    y: Tensor = norm(folded(x, 1, n), *flat, *options)  # (B, N * C, *)
    return unfolded(y, 1, n), 1


def _flattens_to_view(statistic: Operand) -> bool:
    """Whether (N, C) can be seen as (N * C) without a copy."""
    return statistic[1] is not None and members_first(statistic).is_contiguous()
