"""Outputs of all members on held-out data and the targets to them, checked and laid out in rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SHOWN = 8


def check_outputs(call: str, outputs: Any, *, minus_infinity: bool = False) -> Tensor:
    """The outputs, or an error unless they are numbers with the members on axis 0.

    Args:
        call: Name of the public function, for the messages.
        outputs: What is to be outputs of all members.
        minus_infinity: Whether -inf is a number here, as it is among logits.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"{call}: expected one tensor of outputs, got {type(outputs).__name__}; pass each"
            f" tensor in it by itself"
        )
    if outputs.ndim < 2 or 0 in outputs.shape:
        raise ValueError(
            f"{call}: outputs have a member axis and then rows, at least one of each, but their"
            f" shape is {tuple(outputs.shape)}"
        )
    if not outputs.is_floating_point():
        raise TypeError(
            f"{call}: outputs are real floating-point numbers, got {outputs.dtype}; outputs.float()"
            f" converts integers"
        )
    bad = outputs.isnan() | (outputs.isposinf() if minus_infinity else outputs.isinf())
    members = bad.flatten(1).any(1).nonzero().flatten().tolist()
    if members:
        raise ValueError(
            f"{call}: {_of(members)} among {len(outputs)} {_has(members)} outputs that are NaN or"
            f" infinite, which would show in every average, at weight zero too; leave out such"
            f" members:\n\n    keep = outputs.isfinite().flatten(1).all(1)\n    ens, outputs ="
            f" ens[keep], outputs[keep]"
        )
    return outputs.detach()


def class_rows(call: str, outputs: Tensor, targets: Any, dim: int) -> tuple[Tensor, Tensor]:
    """Class scores and class targets as rows, or an error that says what doesn't fit.

    Args:
        call: Name of the public function, for the messages.
        outputs: Checked outputs.
        targets: What is to be the true classes.
        dim: The class axis of the outputs.

    Returns:
        The scores and the targets, int64 and on the outputs' device.

    Shape:
        - outputs: (N, *, C)
        - targets: (*)
        - returns: (N, M, C) and (M), with M the number of elements of (*)
    """
    shape = tuple(outputs.shape)
    if not -outputs.ndim <= dim < outputs.ndim or dim % outputs.ndim == 0:
        raise ValueError(
            f"{call}: dim={dim} is no class axis of outputs of shape {shape}; axis 0 is the member"
        )
    moved = outputs.movedim(dim, -1)
    if not isinstance(targets, Tensor):
        raise TypeError(f"{call}: targets are a tensor of classes, got {type(targets).__name__}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(
            f"{call}: targets are classes, integers counted from 0, got {targets.dtype};"
            f" targets.long() converts them"
        )
    if targets.shape != moved.shape[1:-1]:
        raise ValueError(
            f"{call}: outputs of shape {shape} with the classes on axis {dim} need targets of shape"
            f" {tuple(moved.shape[1:-1])}, got {tuple(targets.shape)}"
        )
    targets = targets.detach().to(outputs.device, torch.int64).reshape(-1)
    classes = moved.shape[-1]
    lowest, highest = int(targets.min()), int(targets.max())
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"{call}: targets are classes from 0 to {classes - 1}, but they go from {lowest} to"
            f" {highest}; leave out the rows of others: outputs[:, known], targets[known]"
        )
    return moved.reshape(len(moved), -1, classes), targets


def number_rows(call: str, outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """Predicted numbers and their targets as rows, or an error that says what doesn't fit.

    Args:
        call: Name of the public function, for the messages.
        outputs: Checked outputs.
        targets: What is to be the true numbers.

    Returns:
        Both in the outputs' dtype and on their device.

    Shape:
        - outputs: (N, *)
        - targets: (*)
        - returns: (N, M) and (M), with M the number of elements of (*)
    """
    if not isinstance(targets, Tensor):
        raise TypeError(f"{call}: targets are a tensor of numbers, got {type(targets).__name__}")
    if targets.shape != outputs.shape[1:]:
        raise ValueError(
            f"{call}: outputs of shape {tuple(outputs.shape)} need targets of shape"
            f" {tuple(outputs.shape[1:])}, got {tuple(targets.shape)}; an axis of length 1 is"
            f" taken away by outputs.squeeze(-1)"
        )
    if not bool(targets.isfinite().all()):
        raise ValueError(f"{call}: targets are finite, but some are NaN or infinite")
    targets = targets.detach().to(outputs.device, outputs.dtype)
    return outputs.flatten(1), targets.flatten()


def check_probabilities(call: str, rows: Tensor) -> None:
    """Raise unless each row is a distribution over the classes, to the precision of a half.

    Shape:
        - rows: (N, M, C)
    """
    total = rows.sum(-1, dtype=torch.float32)
    off = ((total - 1).abs() > 0.02).any(1) | (rows < 0).flatten(1).any(1)
    members = off.nonzero().flatten().tolist()
    if members:
        raise ValueError(
            f"{call}: these outputs are to be probabilities, not negative and one in sum over the"
            f" classes, but those of {_of(members)} aren't; of logits take outputs.softmax(-1),"
            f" of log-probabilities outputs.exp()"
        )


def _of(members: list[int]) -> str:
    listed = ", ".join(map(str, members[:_SHOWN]))
    more = f" and {len(members) - _SHOWN} more" if len(members) > _SHOWN else ""
    return f"member{'s' if len(members) > 1 else ''} {listed}{more}"


def _has(members: list[int]) -> str:
    return "have" if len(members) > 1 else "has"
