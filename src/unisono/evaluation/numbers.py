"""Predicted numbers of all members for one minibatch: points, or means and variances."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from unisono import uncertainty
from unisono.collectives import member_group
from unisono.evaluation.readings import (
    Reading,
    check_members,
    check_tensor,
    mismatch,
    stack_last,
    wide,
)
from unisono.member_axis import log_mean, shares
from unisono.training.combined import Combine

_CONVERT = (
    "say how what a member returns becomes a prediction of the targets' shape, or a pair of mean "
    "and variance:\n\n"
    "    convert=lambda out: (out[..., 0], out[..., 1].exp())  # of mean and log-variance"
)


class NumberReader:
    """Reads predictions (N, B, *), or a pair of means and variances of Gaussians.

    Args:
        n: The number of members.
        weights: Their shares in the combined prediction; None for equal ones.
        combine: Outputs of all members -> the combined prediction in the same form; None for the
            mixture.
        mesh: The ranks that hold the other members; None for none.

    Shape:
        - weights: (N,)
    """

    unit = "squared units of the targets"

    def __init__(
        self,
        n: int,
        *,
        weights: Tensor | None,
        combine: Combine | None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self._n = n
        self._mesh = mesh
        self._group = member_group("evaluate", mesh)
        self._weights = weights
        self._combine = combine

    def read(self, outputs: Any, targets: Any) -> Reading:
        """Read a minibatch; see `Reader`."""
        mean, variance = self._parts(outputs, "what the ensemble returns")
        check_members("what the ensemble returns", mean, self._n)
        if targets is not None:
            targets = self._check_targets(targets, mean)
            mean = mean.reshape(self._n, *targets.shape)
            variance = variance if variance is None else variance.reshape(mean.shape)
        found = uncertainty.regression(mean, variance, weights=self._weights, mesh=self._mesh)
        combined, combined_variance = found.prediction, None
        if self._combine is not None:
            combined, combined_variance = self._combined(outputs, mean, variance)
        values: dict[str, Tensor] = {}
        if targets is not None and variance is not None:
            own = _log_density(mean, variance, targets)
            if combined_variance is not None:
                joint = _log_density(combined[None], combined_variance[None], targets)[0]
            else:
                joint = log_mean(own, self._shares(own), self._group)
            values["nll"] = -stack_last(own, joint)
        return Reading(
            stack_last(mean, combined),
            targets,
            values,
            torch.stack([part.flatten() for part in found[1:]]),
            None if variance is None else wide(variance).flatten(1),
        )

    def check(self) -> None:
        """Numbers are what they are."""

    def _shares(self, values: Tensor) -> Tensor | None:
        if self._weights is None:
            return None
        return shares("evaluate", self._weights, values, self._group)

    def _combined(
        self, outputs: Any, mean: Tensor, variance: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        assert self._combine is not None
        one, spread = self._parts(self._combine(outputs), "what combine returns")
        if one.numel() != mean[0].numel() or (spread is None) != (variance is None):
            raise mismatch(
                [
                    f"a member returns {_form(mean[0], variance)}",
                    f"combine returned {_form(one, spread)}",
                ],
                "combine makes one prediction, in the form that a member has",
                "As the default does: combine=lambda outputs: outputs.mean(0)",
            )
        shape = mean.shape[1:]
        return one.reshape(shape), None if spread is None else spread.reshape(shape)

    def _parts(self, outputs: Any, what: str) -> tuple[Tensor, Tensor | None]:
        """Mean and variance, in the widest dtype."""
        if not (isinstance(outputs, tuple | list) and len(outputs) == 2):
            mean = check_tensor(f"{what}, if no pair of mean and variance,", outputs, _CONVERT)
            return self._real(what, mean), None
        mean, variance = (
            self._real(
                what, check_tensor(f"each of the pair of mean and variance in {what}", x, _CONVERT)
            )
            for x in outputs
        )
        if mean.shape != variance.shape:
            raise mismatch(
                [
                    f"the mean has shape {tuple(mean.shape)}",
                    f"the variance {tuple(variance.shape)}",
                ],
                "each predicted mean has one variance",
                f"If the two are something else, {_CONVERT}",
            )
        return mean, variance

    def _real(self, what: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            raise TypeError(f"evaluate: {what} is of floating dtype, got {tensor.dtype}")
        return wide(tensor)

    def _check_targets(self, targets: Any, mean: Tensor) -> Tensor:
        y = check_tensor("the targets of a minibatch", targets, "pass pairs (inputs, numbers)")
        if y.is_complex():
            raise TypeError(f"evaluate: targets are real numbers, got {y.dtype}")
        # (B, 1) and (B) are the same numbers; any other pair would be broadcast with each other.
        if y.ndim == 0 or _without_ones(y.shape) != _without_ones(mean.shape[1:]):
            raise mismatch(
                [
                    f"the predictions have shape {tuple(mean.shape)}",
                    f"the targets have shape {tuple(y.shape)}",
                ],
                "predictions (N, B, *) have targets (B, *)",
                f"Pass targets of shape {tuple(mean.shape[1:])}, or {_CONVERT}",
            )
        return wide(y)


def _log_density(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """Of Gaussians, summed over the numbers of a row: (N, B, *) -> (N, B)."""
    terms = (targets - mean).square() / variance + variance.log() + math.log(2 * math.pi)
    return -0.5 * terms.flatten(2).sum(2) if terms.ndim > 2 else -0.5 * terms


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    """The shape of a minibatch without trailing axes of length 1; the rows stay."""
    found = list(shape)
    while len(found) > 1 and found[-1] == 1:
        found.pop()
    return tuple(found)


def _form(mean: Tensor, variance: Tensor | None) -> str:
    shape = f"shape {tuple(mean.shape)}"
    return f"one tensor of {shape}" if variance is None else f"mean and variance of {shape}"
