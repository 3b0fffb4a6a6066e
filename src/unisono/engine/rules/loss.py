"""``aten::cross_entropy_loss`` and ``nll_loss_nd``: the members are more of the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import for_each_member, unfolded

_NONE, _MEAN, _SUM = 0, 1, 2  # at::Reduction


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
        return F.cross_entropy(
            x,
            y,
            w,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )

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
        return total, 0
    if y.is_floating_point():  # probabilities of the classes: the mean is over the examples
        return total / (losses.numel() / n), 0
    counted = y != ignore_index
    if class_weight is None:
        return total / _sum_per_member(counted, n), 0
    return total / _sum_per_member(class_weight[torch.where(counted, y, 0)] * counted, n), 0


def _sum_per_member(values: Tensor, n: int) -> Tensor:
    """(N * B, *) -> (N)."""
    return unfolded(values, 0, n).flatten(1).sum(1)
