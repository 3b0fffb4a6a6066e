"""What the members say of one minibatch, in the one form that all metrics take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from unisono.training.tensors import listed


class Reading(NamedTuple):
    """One minibatch, read.

    Args:
        predictions: Of every member, and last that of all together: class probabilities or means.
        targets: As they came; none for rows of another distribution.
        row_values: Metric -> values that are averaged over the rows.
        uncertainty: Of each row: total, aleatoric, epistemic.
        own: What each member states by itself of each row; None if it states nothing.

    Shape:
        - predictions: (N + 1, B, C, *) or (N + 1, B, *)
        - targets: (B, *)
        - each of row_values: (N + 1, R) for R = B times the axes *
        - uncertainty: (3, R)
        - own: (N, R)
    """

    predictions: Tensor
    targets: Tensor | None
    row_values: Mapping[str, Tensor]
    uncertainty: Tensor
    own: Tensor | None


class Reader(Protocol):
    """Turns outputs into a reading: the part that knows classification or regression."""

    unit: str

    def read(self, outputs: Any, targets: Any) -> Reading:
        """Read a minibatch; targets are None for rows of another distribution."""

    def check(self) -> None:
        """Raise if something was wrong with the targets; asked once, at the end."""


def wide(tensor: Tensor) -> Tensor:
    """In the widest dtype that its device has: sums over many rows need it."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def check_tensor(what: str, found: Any, remedy: str) -> Tensor:
    """Return it if it is a tensor, or raise with the edit."""
    if isinstance(found, Tensor):
        return found
    kind = type(found).__name__
    raise TypeError(f"evaluate: expected {what} to be one tensor, got {kind}; {remedy}")


def check_members(name: str, tensor: Tensor, n: int) -> None:
    """Raise unless axis 0 is the member and axis 1 the row."""
    if tensor.ndim < 2 or tensor.shape[0] != n:
        raise ValueError(
            f"evaluate: {name} has the {n} members on axis 0 and the rows on axis 1, got shape "
            f"{tuple(tensor.shape)}"
        )


def mismatch(facts: Sequence[str], expected: str, remedy: str) -> ValueError:
    """The error for shapes that don't fit each other."""
    return ValueError(f"evaluate: {expected}, but:\n\n{listed(facts)}\n\n{remedy}")


def stack_last(members: Tensor, combined: Tensor) -> Tensor:
    """Members and, behind them, the prediction of all together: (N + 1, *)."""
    return torch.cat([members, combined.unsqueeze(0).to(members.dtype)])
