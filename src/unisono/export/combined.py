"""One answer from N inside of an exported graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from unisono import calibration, combine, member_axis, uncertainty
from unisono.combination import Combination
from unisono.errors import ExportError

CombinationName = Literal["mean", "probabilities", "vote", "uncertainty"]
"""What an export may return in place of the members' outputs."""


def combined(call: str, name: CombinationName, combination: Combination, outputs: Any) -> Any:
    """What the members' outputs come to.

    Args:
        call: The public call, for messages.
        name: How to combine them.
        combination: Weights and temperatures of the ensemble.
        outputs: What the ensemble returned.

    Raises:
        ExportError: If the outputs are several tensors, or what is set in ens.combination has no
            meaning for this combination.
    """
    if not isinstance(outputs, Tensor):
        raise ExportError(
            f"{call}: combination={name!r} combines one tensor of outputs, but the members return"
            f" a {type(outputs).__name__}; return the logits alone, or leave out combination="
        )
    return _COMBINATIONS[name](call, combination, outputs)


def check_name(call: str, name: str | None) -> None:
    """Raise unless there is such a combination."""
    if name is not None and name not in get_args(CombinationName):
        listed = ", ".join(map(repr, get_args(CombinationName)))
        raise ValueError(f"{call}: combination is None or one of {listed}; got {name!r}")


def _mean(call: str, combination: Combination, outputs: Tensor) -> Tensor:
    if combination.temperatures is not None or combination.pooled_temperature is not None:
        raise ExportError(
            f'{call}: combination="mean" averages outputs as they are, but ens.combination has'
            f' temperatures, which divide logits; use combination="probabilities", or drop them:'
            f" ens.combination.set(weights=ens.combination.weights)"
        )
    return combination.weighted(outputs)


def _probabilities(call: str, combination: Combination, logits: Tensor) -> Tensor:
    return combination.probabilities(logits)


def _vote(call: str, combination: Combination, outputs: Tensor) -> Tensor:
    """`combine.vote`, by counting each class: ONNX has no running maximum to sort votes with."""
    if not outputs.is_floating_point():
        return combine.vote(outputs)  # of labels it isn't known how many there may be
    dim = member_axis.class_axis(call, outputs, -1)
    choices = member_axis.chosen(outputs, dim)  # (N, *)
    classes = torch.arange(outputs.shape[dim], device=outputs.device)
    votes = (choices.unsqueeze(-1) == classes).to(torch.int64).sum(0)  # (*, C)
    most, winner = votes.amax(-1), votes.argmax(-1)  # of equals the lowest
    return torch.where(most > 0, winner, -1)


def _uncertainty(call: str, combination: Combination, logits: Tensor) -> dict[str, Tensor]:
    if combination.pooled_temperature is not None:
        raise ExportError(
            f'{call}: combination="uncertainty" splits the entropy of an average of the members,'
            f" but ens.combination has a pooled_temperature, which changes that average; use"
            f' combination="probabilities", or leave it out: ens.combination.set(weights=...,'
            f" temperatures=...)"
        )
    if combination.temperatures is not None:
        logits = calibration.apply(logits, combination.temperatures)
    return uncertainty.classification(logits, weights=combination.weights)._asdict()


_COMBINATIONS: Final[Mapping[str, Callable[[str, Combination, Tensor], Any]]] = {
    "mean": _mean,
    "probabilities": _probabilities,
    "vote": _vote,
    "uncertainty": _uncertainty,
}
