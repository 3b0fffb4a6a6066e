"""Make a recorded program shorter without changing what it computes.

The order of the ops stays. What is left out: ops on constants, views that exist already, ops that
nobody needs, copies of what nobody changes. Elementwise ops write into their operand where it is
read for the last time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from unisono.engine.capture.folding import with_folded_norms
from unisono.engine.capture.trace import Op, Ref, Trace, map_args

# Copies of a tensor as it is, if the layout doesn't change either.
_COPIES: Final = frozenset({"clone", "_to_copy", "lift_fresh_copy"})
_COMMUTE: Final = frozenset({torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor})


@dataclass(frozen=True)
class Program:
    """What a replay does."""

    trace: Trace
    ops: list[Op]
    outputs: list[Ref]
    views: Mapping[Ref, Ref]  # views of weights, taken once -> the weight


def simplify(trace: Trace) -> Program:
    """The program that does what was recorded."""
    ops = _without_constants(trace)
    ops, views = _without_views_of_weights(trace, ops)
    ops = _without_repetitions(trace, ops, views)
    ops = _needed(trace, ops, trace.outputs, lambda ref: trace.values[ref].storage)
    ops = with_folded_norms(trace, ops)
    ops, outputs = _with_fresh_outputs(trace, ops)
    reuse = _Reuse(trace, ops, outputs)
    ops, outputs = reuse.run()
    ops = _needed(trace, ops, outputs, reuse.root)  # without views of what has moved
    return Program(trace, ops, outputs, views)


def _without_constants(trace: Trace) -> list[Op]:
    """Leave out what comes out the same in every replay; its values are those of the recording."""
    fixed = {k for k, origin in enumerate(trace.origins) if origin in ("op", "constant")}
    fixed -= {
        trace.values[ref].storage
        for op in trace.ops
        for ref in op.written
        if trace.origin(ref) == "constant"
    }
    read: set[int] = set()  # storages that a replay has read so far
    for op in trace.ops:
        written = {trace.values[ref].storage for ref in op.written}
        if op.constant:
            fixed -= written & read  # the replay has to see it before and after
        else:
            fixed -= written
            read |= {trace.values[ref].storage for ref in op.reads}
    return [
        op
        for op in trace.ops
        if not op.constant
        or not op.results
        or not all(trace.values[ref].storage in fixed for ref in (*op.results, *op.written))
    ]


def _without_views_of_weights(trace: Trace, ops: list[Op]) -> tuple[list[Op], dict[Ref, Ref]]:
    """Leave out views of weights: they are taken once, and see every step of an optimizer."""
    views: dict[Ref, Ref] = {}
    kept = []
    for op in ops:
        source = next(iter(op.reads), Ref(-1))
        weight = source if source in trace.weights else views.get(source)
        if weight is None or op.written or not all(_is_view(trace, r, weight) for r in op.results):
            kept.append(op)
        else:
            views.update({ref: weight for ref in op.results if ref not in trace.weights})
    return kept, views


def _is_view(trace: Trace, ref: Ref, weight: Ref) -> bool:
    """Whether the value is a part of the weight, in the weight's own numbers."""
    value, base = trace.values[ref], trace.values[weight]
    same_bits = value.tensor.is_conj() == base.tensor.is_conj() and (
        value.tensor.is_neg() == base.tensor.is_neg()
    )
    return value.storage == base.storage and value.tensor.dtype == base.tensor.dtype and same_bits


def _without_repetitions(trace: Trace, ops: list[Op], views: Mapping[Ref, Ref]) -> list[Op]:
    """Leave out views of which the program has the same already, the operand itself above all."""
    defined = {*trace.inputs, *trace.weights, *views}
    kept = []
    for op in ops:
        new = set(op.results) - defined
        if new or op.written or op.random or not op.results:
            kept.append(op)
            defined |= new
    return kept


def _needed(
    trace: Trace, ops: list[Op], outputs: list[Ref], storage: Callable[[Ref], int]
) -> list[Op]:
    """Leave out ops whose results nobody reads.

    Random ops stay, so that one seed gives the numbers that it gives in a plain call, and ops
    without result, which check something.
    """
    values = set(outputs)
    storages = set(map(storage, outputs))
    kept = []
    for op in reversed(ops):
        if (
            op.random
            or not (op.results or op.written)
            or not values.isdisjoint(op.results)
            or any(
                trace.origins[storage(ref)] != "op" or storage(ref) in storages
                for ref in op.written
            )
        ):
            kept.append(op)
            values.update(op.reads)
            storages.update(map(storage, op.reads))
    return kept[::-1]


def _with_fresh_outputs(trace: Trace, ops: list[Op]) -> tuple[list[Op], list[Ref]]:
    """Copy outputs that would be a weight, or a constant that the next replay returns again."""
    own = own_storages(trace, ops)
    copies: dict[Ref, Ref] = {}
    for ref in trace.outputs:
        value = trace.values[ref]
        origin = trace.origins[value.storage]
        if value.storage in own or origin == "input" or ref in copies:
            continue
        trace.origins.append("op")
        copies[ref] = trace.add(value.tensor.clone(), len(trace.origins) - 1)
        ops = [*ops, Op(torch.ops.aten.clone.default, (ref,), {}, copies[ref])]
    return ops, [copies.get(ref, ref) for ref in trace.outputs]


def own_storages(trace: Trace, ops: list[Op]) -> set[int]:
    """The storages that a replay allocates."""
    found = {trace.values[ref].storage for op in ops for ref in op.results}
    return {storage for storage in found if trace.origins[storage] == "op"}


class _Reuse:
    """One pass that lets ops write into memory that nobody reads any more.

    A value that moves into another one's place takes its name and joins its storage.
    """

    def __init__(self, trace: Trace, ops: list[Op], outputs: list[Ref]) -> None:
        self._trace = trace
        self._ops = ops
        self._outputs = outputs
        self._names: dict[Ref, Ref] = {}
        self._places: dict[tuple[int, Any], Ref] = {}
        self._bases: dict[int, Ref] = {}  # what an op returned -> the first value in its storage
        self._roots: dict[int, int] = {}
        self._last_read: dict[int, int] = {}
        self._last_write: dict[int, int] = {}
        for k, op in enumerate(ops):
            self._last_read.update({trace.values[ref].storage: k for ref in op.reads})
            self._last_write.update({trace.values[ref].storage: k for ref in op.written})
        self._own = own_storages(trace, ops)
        self._returned = {trace.values[ref].storage for ref in outputs}
        self._last_read.update(dict.fromkeys(self._returned, len(ops)))

    def run(self) -> tuple[list[Op], list[Ref]]:
        """The new ops and the new outputs."""
        kept = []
        for k, op in enumerate(self._ops):
            op = self._renamed(op)
            if self._is_superfluous_copy(k, op) or self._is_known_view(op):
                continue
            kept.append(self._in_place(k, op))
            for ref in op.results:
                self._bases.setdefault(self.root(ref), ref)
                self._places.setdefault((self.root(ref), self._trace.values[ref].layout), ref)
        return kept, [self._names.get(ref, ref) for ref in self._outputs]

    def _renamed(self, op: Op) -> Op:
        def rename(arg: Any) -> Any:
            return self._names.get(arg, arg) if isinstance(arg, Ref) else arg

        written = frozenset(map(rename, op.written))
        args, kwargs = map_args(rename, op.args), map_args(rename, op.kwargs)
        return replace(
            op, args=args, kwargs=kwargs, result=map_args(rename, op.result), written=written
        )

    def root(self, ref: Ref) -> int:
        """The storage in which the value is now."""
        storage = self._trace.values[ref].storage
        while storage in self._roots:
            storage = self._roots[storage]
        return storage

    def _is_superfluous_copy(self, k: int, op: Op) -> bool:
        if op.name not in _COPIES or not isinstance(op.result, Ref) or op.random:
            return False
        source, copy = op.args[0], op.result
        if self._trace.values[copy].layout != self._trace.values[source].layout:
            return False
        a, b = self.root(source), self.root(copy)
        changes = max(self._last_write.get(a, -1), self._last_write.get(b, -1)) > k
        if self._dies(source, k) or not (changes or b in self._returned):
            self._join(copy, source)
            return True
        return False

    def _is_known_view(self, op: Op) -> bool:
        """Whether a view is one that exists, now that its operand has moved."""
        if op.written or not isinstance(op.result, Ref) or not op.reads:
            return False
        root = self.root(op.result)
        known = self._places.get((root, self._trace.values[op.result].layout))
        if known is None or root != self.root(op.reads[0]):
            return False
        self._names[op.result] = known
        return True

    def _whole(self, ref: Ref) -> Ref:
        """The tensor of which the value is a transpose, if it is one."""
        base = self._bases.setdefault(self.root(ref), ref)
        return base if self._trace.values[ref].permutes(self._trace.values[base]) else ref

    def _in_place(self, k: int, op: Op) -> Op:
        target = _in_place_variant(op)
        if target is None:
            return op
        for args in _orders(op):
            operand, others = args[0], [*args[1:], *op.kwargs.values()]
            if self._can_hold(operand, op.result, k) and all(
                ref == operand or self.root(ref) != self.root(operand)
                for ref in replace(op, args=tuple(others), kwargs={}).reads
            ):
                self._join(op.result, operand)
                if len(op.reads) == 1:
                    operand = self._whole(operand)
                args = (operand, *args[1:])
                written = frozenset({operand})
                return replace(op, target=target, args=args, result=operand, written=written)
        return op

    def _can_hold(self, operand: Any, result: Any, k: int) -> bool:
        values = self._trace.values
        return (
            isinstance(operand, Ref)
            and isinstance(result, Ref)
            and operand != result
            and values[result].layout == values[operand].layout
            and self._dies(operand, k)
        )

    def _dies(self, ref: Ref, k: int) -> bool:
        """Whether op k is the last to read memory that this program has allocated."""
        root = self.root(ref)
        return root in self._own and self._last_read.get(root, -1) <= k

    def _join(self, ref: Ref, place: Ref) -> None:
        a, b = self.root(place), self.root(ref)
        self._names[ref] = place
        self._roots[b] = a
        for last in (self._last_read, self._last_write):
            last[a] = max(last.get(a, -1), last.get(b, -1))
        if b in self._returned:
            self._returned.add(a)


def _in_place_variant(op: Op) -> Any:
    """``relu_`` for ``relu``; None for what isn't elementwise or has no such variant."""
    if torch.Tag.pointwise not in op.target.tags or op.written or op.random:
        return None
    namespace = getattr(torch.ops, str(op.target.namespace))
    packet = getattr(namespace, f"{op.name}_", None)
    _, _, overload = str(op.target).rpartition(".")
    return getattr(packet, overload, None)


def _orders(op: Op) -> list[tuple[Any, ...]]:
    """The arguments, and the first two exchanged where that is the same."""
    if op.target in _COMMUTE and len(op.args) == 2 and not op.kwargs:
        return [op.args, op.args[::-1]]
    return [op.args]
