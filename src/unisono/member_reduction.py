"""Sums and means over the member axis: of this process, or of all ranks that hold members.

``group`` stands for the ranks that hold the other members, and None for no others. A rank sends
what is left when its own members are summed, never something with a member axis.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from unisono.collectives import all_max, all_sum


def total(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over all members: ``sum_i values[i]``.

    Shape:
        - values: (n, *), of this rank's members
        - returns: (*)
    """
    own = values.sum(0)
    return own if group is None else all_sum(own, group)


def mean(values: Tensor, w: Tensor | None, group: ProcessGroup | None) -> Tensor:
    """Mean over all members: ``sum_i values[i] / N``, or ``sum_i w[i] values[i]``.

    Args:
        values: Of this rank's members.
        w: Their shares of one, such as `member_axis.shares`; None for equal ones.
        group: The ranks that hold the other members.

    Shape:
        - values: (n, *)
        - w: (n, 1, ...), with as many axes
        - returns: (*)
    """
    if w is not None:
        return total(w * values, group)
    if group is None:
        return values.mean(0)
    return _over_count(values.sum(0), len(values), group)


def log_mean_exp(log_values: Tensor, log_w: Tensor | None, group: ProcessGroup | None) -> Tensor:
    """``log(sum_i exp(log_values[i]) / N)``, or with ``w[i]`` for 1/N, never leaving logarithms.

    Args:
        log_values: Of this rank's members.
        log_w: Logarithms of their shares of one; None for equal ones.
        group: The ranks that hold the other members.

    Shape:
        - log_values: (n, *)
        - log_w: (n, 1, ...), with as many axes
        - returns: (*)
    """
    n = log_values.shape[0]
    own = torch.logsumexp(log_values if log_w is None else log_values + log_w, 0)
    if group is None:
        return own - math.log(n) if log_w is None else own
    # The result doesn't depend on the highest, so that needs no gradient.
    highest = all_max(own, group)
    highest = torch.where(highest.isfinite(), highest, 0)
    scaled = (own - highest).exp()
    if log_w is None:
        return highest + _over_count(scaled, n, group).log()
    return highest + all_sum(scaled, group).log()


def _over_count(own: Tensor, n: int, group: ProcessGroup) -> Tensor:
    """The sum over the ranks, over the number of all members, which comes along in one message."""
    packed = torch.cat([own.reshape(-1), own.new_full((1,), n)])
    found = all_sum(packed, group)
    return (found.narrow(0, 0, own.numel()) / found.select(0, -1)).reshape(own.shape)
