"""The second attempt at a call that can't run for all members at once.

`op_by_op` runs ``forward`` once more for all members, and runs only the ops that fail for one
member after another. Where the members go different ways in Python itself, the call is left to
the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unisono.engine.call import at_once
from unisono.engine.inputs import PerMember
from unisono.engine.opbyop.detour import Detour, Detours, Stop
from unisono.engine.opbyop.functions import FunctionsByMember
from unisono.engine.parts import Call, Result
from unisono.engine.template import Template
from unisono.engine.tree import tree_map
from unisono.errors import EnsembleError


class MembersDisagree(EnsembleError):
    """The members need different Python values or shapes, so one run can't serve them all."""

    def __init__(self, detour: Detour) -> None:
        super().__init__(f"{detour.op}: {detour.reason}")
        self.detour = detour


def op_by_op(
    template: Template, values: Sequence[Any], call: Call, detours: list[Detour] | None = None
) -> Result:
    """Run ``forward`` once; ops that can't run for all members run for one after another.

    Args:
        template: As for every strategy.
        values: As for every strategy.
        call: As for every strategy.
        detours: Gets one entry for each op that ran so.

    Raises:
        MembersDisagree: If the members go different ways.
    """
    found: list[Detour] = [] if detours is None else detours

    @contextmanager
    def around(level: int) -> Iterator[None]:
        mode = Detours(level, call, template.module, found)
        with FunctionsByMember(mode), mode:
            yield

    try:
        outputs, assigned = at_once(template, values, _with_own_inputs(call), around)
    except Stop as stop:
        raise MembersDisagree(stop.detour) from None
    kept = [item._replace(value=tree_map(_in_own_memory, item.value)) for item in assigned]
    return Result(tree_map(_in_own_memory, outputs), kept)


def _with_own_inputs(call: Call) -> Call:
    """Every tensor as one for each member (no copy), so that what is made of it is, too.

    Only then can a member write into it in place, or take gradients with respect to it.
    """
    seen: dict[int, PerMember[Tensor]] = {}

    def own(leaf: Any) -> Any:
        if isinstance(leaf, PerMember):
            return PerMember(tree_map(alias, leaf.tree))
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in seen:
            seen[id(leaf)] = PerMember(leaf.expand(call.n, *leaf.shape))
        return seen[id(leaf)]

    def alias(leaf: Any) -> Any:
        return leaf.view_as(leaf) if isinstance(leaf, Tensor) else leaf

    args = tuple([tree_map(own, arg) for arg in call.args])
    return call._replace(args=args, kwargs={k: tree_map(own, v) for k, v in call.kwargs.items()})


def _in_own_memory(leaf: Any) -> Any:
    """An input that comes out as it went in becomes a copy, in which each member has its part."""
    if not isinstance(leaf, Tensor) or leaf.layout is not torch.strided or leaf.dim() == 0:
        return leaf
    return leaf.clone() if len(leaf) > 1 and leaf.stride(0) == 0 else leaf
