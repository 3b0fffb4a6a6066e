"""What members and ensemble say about the test rows, in float64, whatever the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from unisono import uncertainty
from unisono.plots.arrays import Array, to_array
from unisono.report.run import Run

_FAR: Final = 80.0  # beyond that a log-variance is no information, and its exponential may be none


@dataclass(frozen=True, eq=False)
class Answers:
    """Predictions of every member and of the ensemble, and how sure it is.

    Args:
        members: Numbers of the members whose outputs are all finite; the others are left out.
        left_out: Numbers of the others.
        log_p: Logarithms of the members' probabilities; None for a regression.
        mean: The members' means; None for a classification.
        log_variance: The members' log-variances, if they have them.
        prediction: Probabilities, or the mean, of the ensemble.
        total, aleatoric, epistemic: In nats; for a regression as standard deviations.

    Shape:
        - log_p: (N, B, C)
        - mean, log_variance: (N, B)
        - prediction: (B, C) or (B,)
        - total, aleatoric, epistemic: (B,)
    """

    members: tuple[int, ...]
    left_out: tuple[int, ...]
    log_p: Array | None
    mean: Array | None
    log_variance: Array | None
    prediction: Array
    total: Array
    aleatoric: Array
    epistemic: Array


def answers_of(run: Run) -> Answers:
    """Read the outputs of a run.

    Raises:
        ValueError: If no member has finite outputs.
    """
    finite: Array = np.all(np.isfinite(run.outputs), axis=(1, 2))
    if not finite.any():
        raise ValueError(
            f"the run {run.name} can't be reported on: each of its {len(finite)} members has "
            "outputs that aren't finite; train it with a lower learning rate"
        )
    outputs = torch.from_numpy(run.outputs[finite]).to(torch.float64)
    members = tuple(np.flatnonzero(finite).tolist())
    left_out = tuple(np.flatnonzero(~finite).tolist())
    if run.task == "classification":
        found = uncertainty.classification(outputs)
        parts = [to_array(part) for part in found]
        return Answers(members, left_out, to_array(outputs.log_softmax(-1)), None, None, *parts)
    mean = outputs[..., 0]
    logs = outputs[..., 1].clamp(-_FAR, _FAR) if outputs.shape[-1] == 2 else None
    found = uncertainty.regression(mean, None if logs is None else logs.exp())
    deviations = [to_array(part.sqrt()) for part in found[1:]]
    noise = None if logs is None else to_array(logs)
    prediction = to_array(found.prediction)
    return Answers(members, left_out, None, to_array(mean), noise, prediction, *deviations)
