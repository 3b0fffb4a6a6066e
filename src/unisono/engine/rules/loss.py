"""``aten::cross_entropy_loss`` and ``nll_loss_nd``: the members are more of the batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import for_each_member, members_first, unfolded

_NONE, _MEAN, _SUM = 0, 1, 2  # at::Reduction
_VECTOR = 64  # bytes that a CPU computes with at once


def cross_entropy(
    n: int,
    logits: Operand,
    target: Operand,
    weight: Operand | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Operand | None:
    """Take ``cross_entropy(logits[i], target[i])``; (N, B, C, *) -> (N) or (N, B, *)."""

    def elementwise(x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
        loss = partial(
            F.cross_entropy,
            weight=w,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
        if not _is_short(x):
            return loss(x, y)
        x, y = x.t().unsqueeze(0), (y.t() if y.is_floating_point() else y).unsqueeze(0)
        return loss(x, y).squeeze(0)  # (1, C, N * B) -> (N * B)

    return _fold(n, logits, target, weight, reduction, ignore_index, elementwise)


def nll(
    n: int,
    log_probabilities: Operand,
    target: Operand,
    weight: Operand | None = None,
    reduction: int = _MEAN,
    ignore_index: int = -100,
) -> Operand | None:
    """Take ``nll_loss(log_probabilities[i], target[i])``; (N, B, C, *) -> (N) or (N, B, *)."""

    def elementwise(x: Tensor, y: Tensor, w: Tensor | None) -> Tensor:
        return F.nll_loss(x, y, w, ignore_index=ignore_index, reduction="none")

    return _fold(n, log_probabilities, target, weight, reduction, ignore_index, elementwise)


def _fold(
    n: int,
    scores: Operand,
    target: Operand,
    weight: Operand | None,
    reduction: int,
    ignore_index: int,
    elementwise: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Operand | None:
    """Take the loss of N * B examples without reduction, then reduce over each member's own.

    The mean is over the examples that aren't ignored, weighted by the weight of their class:
    ``sum(loss) / sum(weight[target])``.
    """
    if weight is not None and weight[1] is not None:
        return None
    if scores[1] is None and target[1] is None:
        return None  # one loss for all members
    x, y = for_each_member(scores, n), for_each_member(target, n)
    is_single = x.dim() == 2  # (N, C): one example, without batch axis
    if not is_single:
        x, y = x.flatten(0, 1), y.flatten(0, 1)  # (N * B, C, *), (N * B, *)
    class_weight = None if weight is None else weight[0]
    losses = elementwise(x, y, class_weight)  # (N * B, *)
    if reduction == _NONE:
        return losses if is_single else unfolded(losses, 0, n), 0
    total = _sum_per_member(losses, n)
    if reduction == _SUM:
        return total.to(losses.dtype), 0
    if y.is_floating_point():  # probabilities of the classes: the mean is over the examples
        return (total / (losses.numel() / n)).to(losses.dtype), 0
    return (total / _count(n, target, class_weight, ignore_index)).to(losses.dtype), 0


def _is_short(x: Tensor) -> bool:
    """Whether rows of scores are shorter than a vector, so that a softmax goes number by number.

    Over the axis before the last it is up to four times as fast (torch 2.13).
    """
    return x.dim() == 2 and x.device.type == "cpu" and x.shape[1] * x.element_size() < _VECTOR


def _count(n: int, target: Operand, class_weight: Tensor | None, ignore_index: int) -> Tensor:
    """The weight of each member's examples, () if the members have the same targets."""
    y = members_first(target)
    counted = y != ignore_index
    if class_weight is not None:
        classes = torch.where(counted, y, 0).flatten()
        counted = class_weight.index_select(0, classes).reshape(y.shape) * counted
    if target[1] is None:
        return counted.sum(dtype=_wide(counted))
    return _sum_per_member(counted, n)


def _sum_per_member(values: Tensor, n: int) -> Tensor:
    """(N * B, *) or (N, B, *) -> (N)."""
    return values.reshape(n, -1).sum(1, dtype=_wide(values))


def _wide(values: Tensor) -> torch.dtype | None:
    """A dtype for sums: in half precision that of many losses would overflow."""
    return torch.promote_types(values.dtype, torch.float32) if values.is_floating_point() else None
