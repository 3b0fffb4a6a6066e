"""Choose a number of members at a time for which a call stays within a limit of memory."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from unisono.engine.call import first_members
from unisono.engine.inputs import tensors_in
from unisono.engine.parts import Call, Result
from unisono.engine.planning.measuring import why_not_measured
from unisono.engine.planning.memory import Footprint, fitting_chunk, footprint, free_bytes
from unisono.engine.planning.plan import Plan, RunName
from unisono.engine.planning.rehearsal import Rehearsal
from unisono.engine.planning.running import run
from unisono.engine.template import Template
from unisono.engine.where import caller_level
from unisono.errors import EnsembleWarning


def chunk_within(limit: int | None, name: RunName, template: Template, call: Call) -> int | None:
    """How many members to run at once; None for all.

    Args:
        limit: Bytes that a call may allocate; None for half of what is free now.
        name: The strategy that is going to run.
        template: Runs the members that are tried.
        call: What to run.
    """
    if name == "loop" or call.n == 1 or why_not_measured(template, call):
        return None
    device = next((v.device for v in template.values() if isinstance(v, Tensor)), None)
    if limit is None:
        if device is None:
            return None
        limit = free_bytes(device) // 2
    rehearsal = Rehearsal(template, call)

    def of(size: int) -> Footprint:
        def some(template: Template, values: Sequence[Any], call: Call) -> Result:
            own, chunk = first_members(size, template, values, call)
            return run(Plan(name, None, ""), template, own, chunk)

        return footprint(lambda: rehearsal.run(some, "contiguous"))

    try:
        of(1)  # what is allocated once and kept is no part of a call
        size, needed = fitting_chunk(call.n, limit, of(1), of(2))
    except Exception:
        return None  # it can't run in this way; the call itself will show why
    if needed > limit:
        warnings.warn(
            f"Ensemble of {call.n} {type(template.module).__name__}: a call takes about"
            f" {needed:,} bytes with one member at a time, more than the memory_limit of"
            f" {limit:,}; use a smaller batch, or torch.no_grad() where no gradient is needed",
            EnsembleWarning,
            stacklevel=caller_level(),
        )
    return None if size == call.n else size


def sizes_of(call: Call) -> Hashable:
    """The sizes of all inputs."""
    return tuple([tuple(tensor.shape) for tensor in tensors_in(call.args, call.kwargs)])
