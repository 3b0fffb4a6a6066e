"""The prediction of all members together, in the form that the loss of one member takes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from unisono.engine.tree import tree_map
from unisono.member_reduction import log_mean_exp, total

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


class OverRanks(ABC):
    """A combination that is made of sums, so that ranks send no outputs of single members."""

    def __call__(self, outputs: Any) -> Any:
        """The prediction of members that are all here."""
        return self.of_parts(outputs, 0, None)

    @abstractmethod
    def of_parts(self, outputs: Any, num_members: int, group: ProcessGroup | None) -> Any:
        """The prediction of members that are spread over ranks.

        Args:
            outputs: Of the members here, at least one.
            num_members: N, of all.
            group: The ranks; None for this process alone.

        Shape:
            - outputs: (n, B, *) for every tensor
            - returns: (B, *)
        """


class MeanOfMembers(OverRanks):
    """The mean of each tensor over the members."""

    def of_parts(self, outputs: Any, num_members: int, group: ProcessGroup | None) -> Any:
        """See `OverRanks.of_parts`."""

        def mean(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.mean(0) if group is None else total(leaf, group) / num_members

        return tree_map(mean, outputs)


mean_of_members: Final = MeanOfMembers()


@dataclass(frozen=True)
class MeanProbability(OverRanks):
    """The mean of the members' probabilities, from scores to scores.

    Args:
        score: The mean from log-probabilities of members, which ``log_mean`` takes the mean of.
    """

    score: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]

    def of_parts(self, outputs: Any, num_members: int, group: ProcessGroup | None) -> Any:
        """See `OverRanks.of_parts`."""

        def log_mean(log_values: Tensor) -> Tensor:
            if group is None:
                return log_mean_exp(log_values, None, None)
            share = -math.log(num_members)
            return log_mean_exp(log_values + share, log_values.new_zeros(()), group)

        return self.score(outputs, log_mean)


def _class_scores(logits: Tensor, log_mean: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, B, C, *) -> (B, C, *); (N, C) -> (C)."""
    return log_mean(torch.log_softmax(logits, min(2, logits.dim() - 1)))


def _log_probabilities(values: Tensor, log_mean: Callable[[Tensor], Tensor]) -> Tensor:
    return log_mean(values)


def _event_logits(logits: Tensor, log_mean: Callable[[Tensor], Tensor]) -> Tensor:
    """The logit of the mean probability, without leaving the logarithms."""
    return log_mean(F.logsigmoid(logits)) - log_mean(F.logsigmoid(-logits))


_COMBINATIONS: Final[tuple[tuple[tuple[Any, ...], Combine], ...]] = (
    ((F.cross_entropy, nn.CrossEntropyLoss), MeanProbability(_class_scores)),
    ((F.nll_loss, nn.NLLLoss), MeanProbability(_log_probabilities)),
    ((F.binary_cross_entropy_with_logits, nn.BCEWithLogitsLoss), MeanProbability(_event_logits)),
)
