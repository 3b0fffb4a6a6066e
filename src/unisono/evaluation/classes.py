"""Logits of all members for one minibatch: probabilities, and what each row costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from unisono import uncertainty
from unisono.collectives import member_group
from unisono.evaluation.readings import Reading, check_members, check_tensor, mismatch, stack_last
from unisono.member_axis import finite, log_mean, shares
from unisono.training.combined import Combine

_CONVERT = (
    "say how what a member returns becomes logits (B, C, *):\n\n"
    '    evaluate(ens, data, task="classification", convert=lambda out: out["logits"])'
)


class ClassReader:
    """Reads logits (N, B, C, *): the class axis stands where torch's `cross_entropy` has it.

    Args:
        n: The number of members.
        weights: Their shares in the combined prediction; None for equal ones.
        combine: Logits of all members -> logits of the combined prediction; None for the logarithm
            of the mean probability.
        mesh: The ranks that hold the other members; None for none.

    Shape:
        - weights: (N,)
    """

    unit = "nats"

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
        self._range: Tensor | None = None  # lowest and highest target, on their device
        self._classes = 0

    def read(self, outputs: Any, targets: Any) -> Reading:
        """Read a minibatch; see `Reader`."""
        logits = self._check_logits(outputs)
        log_p = _log_probabilities(logits)  # (N, B, C, *)
        found = uncertainty.classification(log_p, dim=2, weights=self._weights, mesh=self._mesh)
        own = -(log_p.exp() * finite(log_p)).sum(2)  # (N, B, *)
        if self._combine is None:
            combined = log_mean(finite(log_p), self._shares(log_p), self._group)
        else:
            combined = self._check_combined(self._combine(outputs), logits)
        everyone = stack_last(log_p, combined)  # (N + 1, B, C, *)
        values = {} if targets is None else self._row_values(everyone, targets)
        return Reading(
            everyone.exp(),
            targets,
            values,
            torch.stack([part.flatten() for part in found[1:]]),
            own.flatten(1),
        )

    def check(self) -> None:
        """Raise if a target was no class."""
        if self._range is None:
            return
        low, high = self._range.tolist()
        if low < 0 or high >= self._classes:
            raise ValueError(
                f"evaluate: targets are classes from 0 to {self._classes - 1}, as the logits have "
                f"{self._classes} of them, but they go from {low} to {high}"
            )

    def _row_values(self, log_p: Tensor, targets: Any) -> dict[str, Tensor]:
        """Of each row: whether it is right, its surprise, its Brier score; (N + 1, R) each."""
        y = self._check_targets(targets, log_p).long()
        self._note_range(y)
        # Out of range waits for `check`: on a GPU it would end the process.
        index = y.clamp(0, log_p.shape[2] - 1).unsqueeze(1)  # (B, 1, *)
        index = index.expand(len(log_p), *index.shape)
        of_target = log_p.gather(2, index).squeeze(2)  # (N + 1, B, *)
        right = (log_p.argmax(2) == y).to(log_p.dtype)
        right = right.masked_fill(log_p.isnan().any(2), torch.nan)
        p = log_p.exp()
        # sum_c (p_c - 1[c = y])^2, without the one-hot tensor.
        brier = p.square().sum(2) - 2 * of_target.exp() + 1
        values = {"accuracy": right, "nll": -of_target, "brier": brier}
        return {name: value.flatten(1) for name, value in values.items()}

    def _shares(self, log_p: Tensor) -> Tensor | None:
        if self._weights is None:
            return None
        return shares("evaluate", self._weights, log_p, self._group)

    def _note_range(self, y: Tensor) -> None:
        if y.numel():
            low, high = y.aminmax()
            if self._range is not None:
                low, high = low.minimum(self._range[0]), high.maximum(self._range[1])
            self._range = torch.stack([low, high])

    def _check_logits(self, outputs: Any) -> Tensor:
        logits = check_tensor("what the ensemble returns", outputs, _CONVERT)
        check_members("what the ensemble returns", logits, self._n)
        if not logits.is_floating_point():
            raise TypeError(f"evaluate: logits are of floating dtype, got {logits.dtype}")
        if logits.ndim < 3 or logits.shape[2] < 2:
            raise ValueError(
                f"evaluate: logits have the shape (N, B, C, *) with at least two classes on axis "
                f"2, got {tuple(logits.shape)}; of one logit z for two classes make two:\n\n"
                f"    convert=lambda z: torch.stack([torch.zeros_like(z), z], 2)  # z: (N, B)"
            )
        self._classes = logits.shape[2]
        return logits

    def _check_targets(self, targets: Any, log_p: Tensor) -> Tensor:
        y = check_tensor("the targets of a minibatch", targets, "pass pairs (inputs, classes)")
        if y.is_floating_point() or y.is_complex():
            raise TypeError(
                f"evaluate: targets are classes, of integer dtype, got {y.dtype} of shape "
                f"{tuple(y.shape)}; of one-hot targets make them by y.argmax(1), whole numbers by "
                f"y.long()"
            )
        expected = (log_p.shape[1], *log_p.shape[3:])
        if tuple(y.shape) != expected:
            logits = (self._n, *log_p.shape[1:])
            raise mismatch(
                [f"the logits have shape {logits}", f"the targets have shape {tuple(y.shape)}"],
                "logits (N, B, C, *) have targets (B, *)",
                f"Pass targets of shape {expected}, or {_CONVERT}",
            )
        return y

    def _check_combined(self, found: Any, logits: Tensor) -> Tensor:
        combined = check_tensor("what combine returns", found, "return logits (B, C, *)")
        if combined.shape != logits.shape[1:]:
            raise mismatch(
                [
                    f"combine got shape {tuple(logits.shape)}",
                    f"it returned shape {tuple(combined.shape)}",
                ],
                "combine makes logits (B, C, *) of logits (N, B, C, *)",
                "As the default does: combine=lambda logits: combine.probabilities(logits).log()",
            )
        return combined.to(torch.promote_types(combined.dtype, torch.float32)).log_softmax(1)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(2)
