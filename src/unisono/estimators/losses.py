"""What members are trained on, and what all of them together would have lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Any, Any], Tensor]


def class_loss(sizes: Sequence[int], *, weighted: bool) -> Loss:
    """Cross entropy, added up over the label columns.

    Args:
        sizes: Number of classes of each column.
        weighted: Whether targets come as (labels, weights).

    Returns:
        A loss of one member: the mean over the rows, each times its weight.

    Shape:
        - output: logits (B, sum of sizes)
        - labels: (B) for one column, (B, columns) for several
        - weights: (B)
    """
    if len(sizes) == 1 and not weighted:
        return F.cross_entropy  # which `fit` knows a short way for

    def loss(output: Tensor, target: Any) -> Tensor:
        labels, weights = target if weighted else (target, None)
        columns = [labels] if len(sizes) == 1 else labels.unbind(1)
        parts = torch.split(output, list(sizes), 1)
        pairs = zip(parts, columns, strict=True)
        each = sum(F.cross_entropy(part, column, reduction="none") for part, column in pairs)
        return _mean(each, weights)

    return loss


def mean_probabilities(sizes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """What combines logits of all members: logarithms of the mean probabilities.

    Args:
        sizes: Number of classes of each label column.

    Returns:
        A function (N, B, sum of sizes) -> (B, sum of sizes).
    """

    def combine(logits: Tensor) -> Tensor:
        parts = [part.log_softmax(-1) for part in torch.split(logits, list(sizes), -1)]
        return torch.logsumexp(torch.cat(parts, -1), 0) - math.log(len(logits))

    return combine


def point_loss(*, weighted: bool) -> Loss:
    """Squared error, the mean over rows and targets.

    Args:
        weighted: Whether targets come as (values, weights).

    Returns:
        A loss of one member.

    Shape:
        - output, values: (B, T)
        - weights: (B)
    """
    if not weighted:
        return F.mse_loss

    def loss(output: Tensor, target: Any) -> Tensor:
        values, weights = target
        return _mean((output - values).square().mean(1), weights)

    return loss


def gaussian_loss(*, weighted: bool) -> Loss:
    """Squared error for the mean, Gaussian negative log-likelihood for the variance.

    ``(y - m)^2 / 2 + ((y - stop(m))^2 / v + log v) / 2``: the mean is learnt as it would be without
    a variance, which otherwise gives up on rows that it finds noisy, and the variance from what the
    mean leaves.

    Args:
        weighted: Whether targets come as (values, weights).

    Returns:
        A loss of one member.

    Shape:
        - output: mean and variance, (B, T) each
        - values: (B, T)
        - weights: (B)

    References: Seitzer et al., "On the Pitfalls of Heteroscedastic Uncertainty Estimation with
    Probabilistic Neural Networks", 2022, https://arxiv.org/abs/2203.09168; Stirn et al., "Faithful
    Heteroscedastic Regression with Neural Networks", 2023, https://arxiv.org/abs/2212.09184
    """

    def loss(output: Any, target: Any) -> Tensor:
        values, weights = target if weighted else (target, None)
        mean, variance = output
        error = (mean - values).square()
        each = error + error.detach() / variance + variance.log()
        return _mean(each.mean(1) / 2, weights)

    return loss


def mixture_moments(outputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of the mixture of all members.

    Args:
        outputs: Means and variances.

    Shape:
        - outputs: (N, B, T) each
        - returns: (B, T) each
    """
    mean, variance = outputs
    return mean.mean(0), variance.mean(0) + mean.var(0, correction=0)


def _mean(each: Any, weights: Tensor | None) -> Tensor:
    found: Tensor = each.mean() if weights is None else (each * weights).mean()
    return found
