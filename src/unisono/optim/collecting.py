"""What a step has to update: parameters with their state, those together that go together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.optim import state as states
from unisono.optim.batch import Batch
from unisono.optim.fused import add_to_all
from unisono.optim.hyperparameters import Steps, Values
from unisono.optim.paths import Method

AllState = MutableMapping[Tensor, Any]
_Kind = tuple[torch.device, torch.dtype, bytes]


def collect(
    method: Method,
    parameters: Sequence[Tensor],
    state: AllState,
    values: Values,
    num_members: int | None,
) -> Iterator[Batch]:
    """Batches of parameters on one device, of one dtype, whose members stand at the same steps.

    Args:
        method: The kind of optimizer.
        parameters: Those with a gradient.
        state: The optimizer's state; what is missing is made.
        values: The hyperparameters.
        num_members: N; None for parameters that all members share, which become (1, *).
    """
    keys = method.moments(values)
    found: defaultdict[_Kind, list[tuple[Tensor, Steps]]] = defaultdict(list)
    for p in parameters:
        steps = _steps(p, state, keys, num_members)
        phase = method.phase(steps).tobytes()
        found[p.device, p.dtype, phase].append((p, steps))

    def rows(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0) if num_members is None else tensor

    for same in found.values():
        yield Batch(
            [rows(p) for p, _ in same],
            [rows(p.grad) for p, _ in same if p.grad is not None],
            {key: [rows(state[p][key]) for p, _ in same] for key in keys},
            same[0][1].astype(np.float64).reshape(-1),
            values,
            key=tuple(id(p) for p, _ in same),
        )


def count(
    method: Method,
    parameters: Sequence[Tensor],
    state: AllState,
    values: Values,
    members: Sequence[int] | None,
) -> None:
    """Count the step.

    Args:
        method: The kind of optimizer.
        parameters: Those that were updated.
        state: The optimizer's state.
        values: The hyperparameters.
        members: The members that have done it; None for all.
    """
    counted = method.counted(values)
    if not counted.any():
        return
    more: float | Tensor = float(counted[0])
    if members is not None or len(counted) > 1:
        each = np.zeros(len(state[parameters[0]][states.STEP]), dtype=np.float32)
        chosen = slice(None) if members is None else list(members)
        each[chosen] = np.broadcast_to(counted, each.shape)[chosen]
        more = torch.from_numpy(each)
    add_to_all([state[p][states.STEP] for p in parameters], more)


def _steps(
    parameter: Tensor, state: AllState, keys: Sequence[str], num_members: int | None
) -> Steps:
    """The steps that each member has done, with a state that is ready for the next one."""
    if not keys:  # as for torch, there is no state then; but there may be one from before
        kept = state.get(parameter, {})
        return states.steps_done(kept) if states.STEP in kept else np.zeros(num_members or 1)
    kept = state[parameter]
    states.prepare(kept, parameter, keys, num_members)
    return states.steps_done(kept)
