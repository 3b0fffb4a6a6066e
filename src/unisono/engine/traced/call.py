"""A call as ``torch.compile`` and ``torch.export`` can trace it.

They can't follow the driver in `call.py`, which nests a level by hand and compares identities.
They do follow ``torch.vmap``, and writes to the dicts of a module, so only these are used here; in
``torch.compile`` the rules hold as in `fused`. Nothing is measured: a call runs for all members at
once, and member by member only where ``strategy="loop"`` asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unisono.engine.axis import at_trace_time, rules_end, rules_start, set_native_attention
from unisono.engine.kernels import install
from unisono.engine.parts import Call
from unisono.engine.planning.plan import StrategyName
from unisono.engine.pool import Pool
from unisono.engine.rules import BY_MEMBER, RULES
from unisono.engine.traced.member import Place, keep, places_of, run_member
from unisono.engine.traced.tree import filled, inputs_of, tensors_of
from unisono.engine.watch import Write

Run = tuple[Any, list[Write]]
"""The outputs of a call, and what ``forward`` assigned."""


def run_traced(pool: Pool, call: Call, strategy: StrategyName, chunk_size: int | None) -> Any:
    """The outputs of ``call`` for all members; what ``forward`` assigned is stored."""
    _prepare()
    places = list(places_of(pool))
    # Native attention has no derivative, and the compiler can make more of the ops behind it.
    native = set_native_attention(False)
    try:
        if strategy == "loop" and call.randomness == "different":
            outputs, writes = _by_member(pool, call, places)
        else:
            outputs, writes = _at_once(pool, call, places, strategy, chunk_size)
    finally:
        set_native_attention(native)
    for write in writes:
        keep(pool, write, call.n)
    # What is the same for all members was only repeated: a copy, so that each can be written to.
    # Strides would tell it apart from other orders in memory, but Dynamo may not know them.
    own = [leaf if leaf.is_contiguous() else leaf.clone() for leaf in tensors_of(outputs)]
    return filled(outputs, iter(own))


@at_trace_time
def _prepare() -> bool:
    install(RULES, BY_MEMBER)
    torch.compiler.allow_in_graph([rules_start, rules_end])  # type: ignore[no-untyped-call]
    return True


def _at_once(
    pool: Pool,
    call: Call,
    places: Sequence[Place],
    strategy: StrategyName,
    chunk_size: int | None,
) -> Run:
    """``torch.vmap`` over the member's forward."""
    # torch.export notes the ops in front of the rules, which could only fix the sizes of a batch.
    rules = strategy != "vmap" and not torch.compiler.is_exporting()
    runs: list[Run] = []

    def run(stacked: list[Tensor], marked: list[Tensor], _: Tensor) -> list[Tensor]:
        if rules:
            rules_start(call.randomness)
        result = run_member(pool, call, places, iter(stacked), iter(marked))
        if rules:
            rules_end()
        runs.append(result)
        return tensors_of(result)

    stacked = [leaf for place in places if place.stacked for leaf in tensors_of(place.value)]
    marked: list[Tensor] = []
    inputs_of(call, marked.append)
    counter = torch.empty(call.n, device="cpu")  # an axis also where nothing is stacked
    mapped = torch.vmap(run, randomness=call.randomness, chunk_size=chunk_size)
    results = mapped(stacked, marked, counter)
    joined: Run = filled(runs[0], iter(results))
    return joined


def _by_member(pool: Pool, call: Call, places: Sequence[Place]) -> Run:
    """The members one after another."""
    stacked = [
        leaf.unbind() for place in places if place.stacked for leaf in tensors_of(place.value)
    ]
    marked: list[Sequence[Tensor]] = []
    inputs_of(call, lambda tensor: marked.append(tensor.unbind()))
    runs = []
    for i in range(call.n):
        own, inputs = iter([each[i] for each in stacked]), iter([each[i] for each in marked])
        runs.append(run_member(pool, call, places if i == 0 else _copied(places), own, inputs))
    columns = zip(*[tensors_of(result) for result in runs], strict=True)
    joined: Run = filled(runs[0], iter([torch.stack(column) for column in columns]))
    return joined


def _copied(places: Sequence[Place]) -> list[Place]:
    """The places with copies of the buffers that are kept once: member 0 alone writes to them."""
    return [
        Place(p.module, p.path, p.key, p.kind, p.value.clone(), False)
        if p.kind == "buffer" and not p.stacked
        else p
        for p in places
    ]
