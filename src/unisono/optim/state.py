"""What an optimizer keeps for each parameter: make it, cut members out of it, copy their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unisono.optim.batch import in_order
from unisono.optim.hyperparameters import Steps
from unisono.rows import copy_rows

State = dict[str, Any]
STEP = "step"


def prepare(state: State, parameter: Tensor, keys: Sequence[str], num_members: int | None) -> None:
    """Give the state what is missing, and the parameter's dtype, device and order in memory.

    Args:
        state: Of this parameter; changed in place.
        parameter: The parameter.
        keys: What the state needs beside ``"step"``.
        num_members: The length of ``"step"``; None for a parameter that all members share.
    """
    if STEP not in state:
        state[STEP] = torch.zeros(() if num_members is None else num_members, dtype=torch.float32)
    for key in keys:
        kept = state.get(key)
        if kept is None:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        else:
            state[key] = in_order(kept, parameter)


def steps_done(state: State) -> Steps:
    """The steps that each member has done: host numbers, so nothing waits for a device."""
    steps: Steps = state[STEP].numpy()
    return steps


def normalise(state: State, num_members: int | None) -> None:
    """Bring a loaded state into our form: torch's own has one step for all, or none for SGD."""
    shape = () if num_members is None else (num_members,)
    if STEP not in state and "momentum_buffer" in state:
        state[STEP] = 0.0 if state["momentum_buffer"] is None else 1.0
    for key in [key for key, value in state.items() if value is None]:
        del state[key]  # torch's SGD has None for a buffer that isn't there
    if STEP in state:
        step = torch.as_tensor(state[STEP], dtype=torch.float32, device="cpu")
        state[STEP] = step.expand(shape).clone()


def select(state: State, members: Sequence[int] | None) -> State:
    """A copy of the state, with the rows of some members; None for all there is."""

    def take(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if members is None:
            return value.detach().clone()
        return value.detach().index_select(0, torch.tensor(members, device=value.device))

    return {key: take(value) for key, value in state.items()}


def copy(
    target: State,
    to: Sequence[int] | None,
    source: State,
    of: Sequence[int] | None,
    parameter: Tensor,
) -> None:
    """Copy the rows ``of`` of one state over the rows ``to`` of another, in place.

    Args:
        target: The state to write to; what it lacks is made, with rows of zeros.
        to: Its rows; None for all of it.
        source: The state to read from. What it lacks has rows of zeros too: nobody stepped yet.
        of: Its rows; None for all of it.
        parameter: The parameter of the target.
    """
    if not source and not target:
        return
    num_members = None if to is None else len(parameter)
    missing = [key for key in source if key != STEP and key not in target]
    prepare(target, parameter, missing, num_members)
    for key, mine in target.items():
        theirs = source.get(key)
        if to is None or of is None:
            mine.zero_() if theirs is None else mine.copy_(theirs)
        elif theirs is None:
            mine.index_fill_(0, torch.tensor(list(to), device=mine.device), 0)
        else:
            copy_rows({key: mine}, to, {key: theirs}, of)
