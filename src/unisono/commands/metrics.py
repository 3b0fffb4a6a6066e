"""How good the members and their ensemble are, from the logits on the test images (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional as F

from unisono import combine

Json: TypeAlias = dict[str, float | list[float | None] | None]


@dataclass(frozen=True)
class Scores:
    """One figure of merit for every member and for the ensemble.

    Args:
        members: One value per member.
        mean_member: The mean of `members`.
        mean_probability: The ensemble that averages the members' probabilities.
        vote: The ensemble that counts the members' votes.
    """

    members: tuple[float, ...]
    mean_member: float
    mean_probability: float
    vote: float

    def to_json(self) -> Json:
        """Return the values for JSON, which has no word for nan: such a value is None."""
        return {
            "members": [finite_or_none(value) for value in self.members],
            "mean_member": finite_or_none(self.mean_member),
            "ensemble_mean_probability": finite_or_none(self.mean_probability),
            "ensemble_vote": finite_or_none(self.vote),
        }


def accuracy(logits: Tensor, labels: Tensor) -> Scores:
    """Return the part of the images that is answered rightly.

    Args:
        logits: Of every member, for the test images.
        labels: The true classes.

    Shape:
        - logits: ``(N, B, classes)``
        - labels: ``(B,)``

    Example:
        >>> import torch
        >>> accuracy(torch.eye(3)[None], torch.tensor([0, 1, 1])).members
        (0.6666666666666666,)
    """
    right = (logits.argmax(-1) == labels).double().mean(-1)  # (N,)
    by_probability = combine.probabilities(logits).argmax(-1)
    return Scores(
        members=tuple(right.tolist()),
        mean_member=right.mean().item(),
        mean_probability=(by_probability == labels).double().mean().item(),
        vote=(combine.vote(logits) == labels).double().mean().item(),
    )


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Scores:
    """Return the mean of ``-log p(true class)`` over the images, in nats.

    A vote gives shares instead of probabilities: ``(votes + 1/classes) / (N + 1)``, as if
    one more member had spread its vote evenly. Without that vote, one image whose true
    class nobody names would make the result infinite.

    Args:
        logits: Of every member, for the test images.
        labels: The true classes.

    Shape:
        - logits: ``(N, B, classes)``
        - labels: ``(B,)``

    Example:
        >>> import torch
        >>> round(negative_log_likelihood(torch.zeros(2, 5, 10), torch.arange(5)).mean_member, 4)
        2.3026
    """
    members, images, classes = logits.shape
    targets = labels.expand(members, images)
    own = F.nll_loss(logits.log_softmax(-1).mT, targets, reduction="none").mean(-1)  # (N,)
    votes = F.one_hot(logits.argmax(-1), classes).sum(0)  # (B, classes)
    shares = (votes.to(logits.dtype) + 1 / classes) / (members + 1)
    return Scores(
        members=tuple(own.tolist()),
        mean_member=own.mean().item(),
        mean_probability=_mean_surprise(combine.probabilities(logits), labels),
        vote=_mean_surprise(shares, labels),
    )


def _mean_surprise(probabilities: Tensor, labels: Tensor) -> float:
    return F.nll_loss(probabilities.log(), labels).item()


def finite_or_none(value: float) -> float | None:
    """Return `value`, or None where JSON has no word for it (nan, infinity)."""
    return value if math.isfinite(value) else None
