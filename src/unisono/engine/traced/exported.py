"""A call inside ``torch.export``: recorded apart, and put into its graph as plain ops.

torch.export notes every op in front of functorch: its graph of a ``torch.vmap`` holds the member's
own ops between an entry and an exit, and torch's batching rules, which then run on tensors without
elements, fix the size of a batch. So the call runs where torch.export doesn't see it, as `fused`
does with the rules of this engine, and only the ops on stacked tensors that it comes to are run
once more, in its sight.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from unisono.engine.attention import NativeAttentionOff
from unisono.engine.axis import TorchDispatchMode, buffers_of, outside_of_export, record
from unisono.engine.inputs import PerMember
from unisono.engine.parts import Assigned, Call, Result
from unisono.engine.planning.plan import Plan, StrategyName
from unisono.engine.planning.running import run
from unisono.engine.pool import Pool
from unisono.engine.template import Template
from unisono.engine.tree import leaves, tree_map
from unisono.engine.where import caller_level, place
from unisono.errors import EnsembleError, EnsembleWarning

_PLACE = ("member", "line")


class FixedSize(NamedTuple):
    """The op after which a size of an input, which should have stayed open, was one number."""

    op: str
    path: str  # of the member's module
    line: str  # of the user's code
    size: int


class _Listening(threading.local):
    """What this thread's exports tell, while somebody asks."""

    def __init__(self) -> None:
        self.fixed: list[FixedSize] | None = None


_listening = _Listening()


@contextmanager
def fixed_sizes() -> Iterator[list[FixedSize]]:
    """Collect which ops fix sizes of inputs, in the exports inside the ``with`` block."""
    outer, _listening.fixed = _listening.fixed, []
    try:
        yield _listening.fixed
    finally:
        _listening.fixed = outer


def run_exported(pool: Pool, call: Call, strategy: StrategyName, chunk_size: int | None) -> Any:
    """The outputs of ``call`` for all members; what ``forward`` assigns to buffers is written."""
    plan = Plan("fused" if strategy == "auto" else strategy, chunk_size, "inside torch.export")
    with outside_of_export():
        template = pool.take()
    try:
        run_one = _run_loop if strategy == "loop" else _run_at_once
        result = run_one(plan, template, call)
    finally:
        pool.give_back(template)
    _write(pool, result.assigned)
    return result.outputs


def notes_ops() -> bool:
    """Whether this is inside of ``torch.export`` without Dynamo, which runs Python as it is."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def _run_loop(plan: Plan, template: Template, call: Call) -> Result:
    """The members one after another, in sight: there are no rules, and no op is taken apart."""
    with NativeAttentionOff():
        return run(plan, template, template.values(), call)


def _run_at_once(plan: Plan, template: Template, call: Call) -> Result:
    """All members at once, recorded out of sight and run once more in sight."""
    values = template.values()
    tensors = _tensors_of((values, call.args, call.kwargs))
    with outside_of_export():
        graph, result = _recorded(plan, template, values, call, tensors)
    with torch.fx.traceback.preserve_node_meta():  # the places in the member
        found = iter(torch.fx.Interpreter(graph).run(*tensors))
    filled: Result = tree_map(lambda leaf: next(found) if _is_value(leaf) else leaf, result)
    return filled


def _recorded(
    plan: Plan,
    template: Template,
    values: Sequence[Any],
    call: Call,
    tensors: Sequence[Tensor],
) -> tuple[torch.fx.GraphModule, Result]:
    """The graph of the call, and its result with the tensors of the recording in it."""
    results: list[Result] = []

    def fn(*given: Tensor) -> list[Any]:
        own = dict(zip(map(id, tensors), given, strict=True))
        args, kwargs = _replaced(call.args, own), _replaced(dict(call.kwargs), own)
        mine = call._replace(args=args, kwargs=kwargs)
        # Attention in plain ops: the others belong to one kind of device, and to torch.
        with NativeAttentionOff(), sdpa_kernel(SDPBackend.MATH), _Places(template, given):
            results.append(run(plan, template, [_replaced(v, own) for v in values], mine))
        return [leaf for _, leaf in leaves(results[-1]) if _is_value(leaf)]

    graph = record(fn, tensors)
    for node in graph.graph.nodes:
        if "custom" in node.meta:  # beside the places, torch's own notes on how it traced
            node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k in _PLACE}
    return graph, results[-1]


class _Places(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes with each op where in the member it stands, and which one fixes a size."""

    def __init__(self, template: Template, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._template = template
        self._open = [size for tensor in inputs for size in tensor.shape if _is_open(size)]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        path, line = place(self._template.module)
        with torch.fx.traceback.annotate({"member": path, "line": line}):
            result = func(*args, **(kwargs or {}))
        if _listening.fixed is not None:
            still = [size for size in self._open if _is_open(size)]
            if len(still) < len(self._open):
                size = next(int(size) for size in self._open if not _is_open(size))
                _listening.fixed.append(FixedSize(str(func), path, line, size))
            self._open = still
        return result


def _is_open(size: Any) -> bool:
    """Whether it is the size of an axis that torch.export has not fixed."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def _write(pool: Pool, assigned: Sequence[Assigned]) -> None:
    """Write what ``forward`` assigned into the buffers, which torch.export notes."""
    for item in assigned:
        if item.kind == "buffer":
            kept = buffers_of(pool.members.get_submodule(item.path)).get(item.key)
            value = item.value
            if kept is None or not isinstance(value, Tensor):
                raise EnsembleError(
                    f"torch.export: forward makes or removes the buffer `{item.name}`; a program"
                    f" has the buffers that were there before"
                )
            kept.copy_(value)  # a value that is the same for all members is repeated
        elif item.key != "training":
            warnings.warn(
                f"torch.export: forward assigns the attribute `{item.name}`, which a program"
                f" doesn't keep: it stays as it was at the export. Make it a buffer, with"
                f" self.register_buffer, if the next call is to find it",
                EnsembleWarning,
                stacklevel=caller_level(),
            )


def _tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in a tree, also under marks, each once."""
    found: dict[int, Tensor] = {}
    for _, leaf in leaves(tree):
        inside = leaves(leaf.tree) if isinstance(leaf, PerMember) else iter((("", leaf),))
        found |= {id(part): part for _, part in inside if isinstance(part, Tensor)}
    return list(found.values())


def _replaced(tree: Any, by_id: Mapping[int, Tensor]) -> Any:
    """The tree with other tensors, also under marks."""

    def other(leaf: Any) -> Any:
        if isinstance(leaf, PerMember):
            return PerMember(tree_map(other, leaf.tree))
        return by_id[id(leaf)] if isinstance(leaf, Tensor) else leaf

    return tree_map(other, tree)


def _is_value(leaf: Any) -> bool:
    """Whether a graph computes it."""
    return isinstance(leaf, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool)
