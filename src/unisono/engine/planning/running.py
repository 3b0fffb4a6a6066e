"""Run a call in one given way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from unisono.engine.attention import NativeAttentionOff
from unisono.engine.call import Strategy, fused, in_chunks, loop, vmap
from unisono.engine.opbyop.detour import Detour
from unisono.engine.opbyop.fallback import op_by_op
from unisono.engine.parts import Call, Result
from unisono.engine.planning.plan import Plan, RunName
from unisono.engine.template import Template

STRATEGIES: Final[Mapping[RunName, Strategy]] = {"fused": fused, "vmap": vmap, "loop": loop}


def run(
    plan: Plan,
    template: Template,
    values: Sequence[Any],
    call: Call,
    detours: list[Detour] | None = None,
) -> Result:
    """The result of a call, run as the plan says.

    Args:
        plan: The way to run.
        template: As for every strategy.
        values: As for every strategy.
        call: As for every strategy.
        detours: Gets the ops that ran for one member after another, of a plan that is op by op.
    """
    if plan.strategy == "loop":
        return loop(template, values, call)
    strategy: Strategy = STRATEGIES[plan.strategy]
    if plan.op_by_op:
        strategy = partial(op_by_op, detours=detours)
    if plan.chunk_size is not None and plan.chunk_size < call.n:
        strategy = in_chunks(strategy, plan.chunk_size)
    if template.has_attention and torch.is_grad_enabled():
        with NativeAttentionOff():
            return strategy(template, values, call)
    return strategy(template, values, call)


@contextmanager
def kept(template: Template, values: Sequence[Any]) -> Iterator[None]:
    """Put the buffers back at the end of a ``with`` block, to which a call writes in place."""
    before = _buffers(template, values)
    try:
        yield
    finally:
        _put_back(before)


def run_or_restore(
    plan: Plan,
    template: Template,
    values: Sequence[Any],
    call: Call,
    detours: list[Detour] | None = None,
) -> Result:
    """The same; if it fails, also by ctrl-C, the buffers are as before."""
    if not template.has_buffers:
        return run(plan, template, values, call, detours)
    before = _buffers(template, values)
    try:
        return run(plan, template, values, call, detours)
    except BaseException:
        _put_back(before)
        raise


def _buffers(template: Template, values: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """The buffers, each with a copy."""
    return [
        (value, value.clone())
        for slot, value in zip(template.slots, values, strict=True)
        if slot.kind == "buffer" and isinstance(value, Tensor)
    ]


@torch.no_grad()
def _put_back(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    for buffer, copy in before:
        buffer.copy_(copy)
