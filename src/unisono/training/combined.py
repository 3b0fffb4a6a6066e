"""The prediction of all members together, in the form that the loss of one member takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unisono.engine.tree import tree_map

Combine = Callable[[Any], Any]
"""Outputs of all members, (N, B, *) -> one prediction, (B, *)."""


def combination_for(loss: Callable[..., Any]) -> Combine:
    """How members are combined for a loss: by what it takes its inputs for.

    Class scores are combined as the logarithm of the mean probability, so that the loss of the
    combined prediction is the negative log-likelihood of the mixture; logits of single events
    likewise; everything else by the mean.

    Args:
        loss: A function or module of `torch.nn`, or any other.

    Returns:
        A function of the stacked outputs.

    Example:
        >>> scores = torch.tensor([[[0.0, 0.0]], [[0.0, 0.0]]])  # (N, B, C)
        >>> combination_for(F.cross_entropy)(scores).exp()
        tensor([[0.5000, 0.5000]])
    """
    for kinds, combine in _COMBINATIONS:
        if loss in kinds or type(loss) in kinds:
            return combine
    return mean_of_members


def mean_of_members(outputs: Any) -> Any:
    """The mean of each tensor over the members."""
    return tree_map(lambda leaf: leaf.mean(0) if isinstance(leaf, Tensor) else leaf, outputs)


def _log_mean_exp(log_values: Tensor) -> Tensor:
    return torch.logsumexp(log_values, 0) - math.log(log_values.shape[0])


def _class_scores(logits: Tensor) -> Tensor:
    """(N, B, C, *) -> (B, C, *); (N, C) -> (C)."""
    return _log_mean_exp(torch.log_softmax(logits, min(2, logits.dim() - 1)))


def _event_logits(logits: Tensor) -> Tensor:
    """The logit of the mean probability, without leaving the logarithms."""
    return _log_mean_exp(F.logsigmoid(logits)) - _log_mean_exp(F.logsigmoid(-logits))


_COMBINATIONS: Final[tuple[tuple[tuple[Any, ...], Combine], ...]] = (
    ((F.cross_entropy, nn.CrossEntropyLoss), _class_scores),
    ((F.nll_loss, nn.NLLLoss), _log_mean_exp),
    ((F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss), _event_logits),
)
