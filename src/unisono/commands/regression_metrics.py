"""How good members and ensemble are at numbers, from means and variances on test rows (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from unisono.commands.metrics import Json, finite_or_none


@dataclass(frozen=True)
class RegressionScores:
    """One figure of merit for every member and for the ensemble.

    Args:
        members: One value per member.
        mean_member: The mean of `members`.
        ensemble: Of the mean of the members' means; for the likelihood, of the mixture of their
            distributions.
    """

    members: tuple[float, ...]
    mean_member: float
    ensemble: float

    def to_json(self) -> Json:
        """Return the values for JSON, which has no word for nan: such a value is None."""
        return {
            "members": [finite_or_none(value) for value in self.members],
            "mean_member": finite_or_none(self.mean_member),
            "ensemble": finite_or_none(self.ensemble),
        }


def root_mean_squared_error(mean: Tensor, targets: Tensor) -> RegressionScores:
    """Return ``sqrt(mean (y - mean)^2)``, in the unit of the target.

    Shape:
        - mean: ``(N, B)``
        - targets: ``(B,)``

    Example:
        >>> import torch
        >>> root_mean_squared_error(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), torch.ones(2)).ensemble
        1.0
    """
    return _scores((mean - targets).square().mean(-1).sqrt(), _error(mean, targets).sqrt())


def r_squared(mean: Tensor, targets: Tensor) -> RegressionScores:
    """Return ``1 - mean (y - mean)^2 / variance of y``.

    Shape:
        - mean: ``(N, B)``
        - targets: ``(B,)``
    """
    spread = targets.var(correction=0)
    return _scores(
        1 - (mean - targets).square().mean(-1) / spread, 1 - _error(mean, targets) / spread
    )


def gaussian_nll(mean: Tensor, log_variance: Tensor, targets: Tensor) -> RegressionScores:
    """Return the mean of ``-log p(y)`` in nats, p Gaussian for a member, their mixture for all.

    Shape:
        - mean, log_variance: ``(N, B)``
        - targets: ``(B,)``

    Example:
        >>> import torch
        >>> zeros = torch.zeros(2, 3)
        >>> round(gaussian_nll(zeros, zeros, torch.zeros(3)).ensemble, 4)
        0.9189
    """
    squares = (targets - mean).square() * (-log_variance).exp()
    log_p = -0.5 * (squares + log_variance + math.log(2 * math.pi))  # (N, B)
    mixture = log_p.logsumexp(0) - math.log(len(mean))
    return _scores(-log_p.mean(-1), -mixture.mean())


def _error(mean: Tensor, targets: Tensor) -> Tensor:
    return (mean.mean(0) - targets).square().mean()


def _scores(members: Tensor, ensemble: Tensor) -> RegressionScores:
    return RegressionScores(tuple(members.tolist()), members.mean().item(), ensemble.item())
