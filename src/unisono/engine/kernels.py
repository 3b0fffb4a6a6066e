"""The kernels that run rules, and ops for one member after another, inside the member axis.

They sit at the dispatch key ``FuncTorchDynamicLayerFrontMode``: it is the first one reached inside
a transform, so a rule there sees ``linear`` or ``batch_norm`` before torch takes them apart, and
it is not reached at all outside of one. The registration is process-wide (torch has no other
kind), so every kernel first asks whether the innermost level is one that this thread entered
here; for everybody else torch's own kernel is called.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from unisono.engine import rng
from unisono.engine.axis import (
    FRONT,
    Operand,
    Randomness,
    Rule,
    Traced,
    attach,
    count_modes,
    current_level,
    detach,
    is_observed,
    levels,
    overload,
    pop_layer,
    push_layer,
    unwrap,
    wrap,
)
from unisono.engine.tree import leaves

Kernel = Callable[..., Any]
"""``kernel(keyset, *args, **options)``."""


class Note(NamedTuple):
    """One op that a kernel of ours ran."""

    op: str
    how: Literal["rule", "member"]
    rule: str
    seconds: float


class _State(threading.local):
    """What holds for the kernels of this thread."""

    def __init__(self) -> None:
        self.of_rule: Randomness = "different"  # what holds for the rule that runs
        self.notes: list[Note] | None = None  # what ran how, while somebody asks


_state = _State()
_install_lock = threading.Lock()
_library: torch.library.Library | None = None


def install(rules: Mapping[str, tuple[Rule, int]], by_member: Collection[str]) -> None:
    """Register the rules with torch, once per process.

    Args:
        rules: For each op (``"linear"``, ``"conv2d.padding"``) the rule and how many of its
            first arguments are looked at for tensors.
        by_member: Ops that are to run for one member after another where they have no rule or
            it returns None. Names that this version of torch doesn't have are passed over.
    """
    global _library
    if _library is not None:
        return
    with _install_lock:
        if _library is not None:
            return
        library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        with warnings.catch_warnings():
            # torch says once per process that a kernel is overridden: that is what we are here for
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered")
            for op in {**dict.fromkeys(by_member), **rules}:
                if overload(op) is None:
                    continue
                kernel: Kernel = torch.library.get_kernel(f"aten::{op}", FRONT).call_boxed
                if op in by_member:
                    kernel = _member_kernel(op, by_member, kernel)
                if op in rules:
                    kernel = _rule_kernel(op, rules, kernel)
                library.impl(op, kernel, FRONT, with_keyset=True)  # type: ignore[no-untyped-call]
        _library = library


@contextmanager
def noted() -> Iterator[list[Note]]:
    """Collect what the kernels of this thread run inside the ``with`` block."""
    outer, _state.notes = _state.notes, []
    try:
        yield _state.notes
    finally:
        _state.notes = outer


def draws_independently() -> bool:
    """For a rule: whether each member is to draw random numbers of its own."""
    return _state.of_rule == "different"


def is_direct() -> bool:
    """Whether rules may be called directly, without the way through torch's dispatcher.

    In a level of ours, and while nobody listens to every op (a mode, `noted`).
    """
    entered = levels.entered
    return bool(
        entered and _state.notes is None and not count_modes() and entered[-1][0] == current_level()
    )


def is_outside() -> bool:
    """Whether this thread is in no level at all, and nobody listens to every op."""
    return not (
        levels.entered
        or _state.notes is not None
        or count_modes()
        or torch.compiler.is_compiling()
        or is_observed()
    )


def run_rule(rule: Rule, otherwise: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Run a rule directly; ``otherwise`` where `is_direct` says no, or the rule doesn't apply."""
    if not is_direct():
        return otherwise(*tensors)
    ours = level, n, _ = levels.entered[-1]
    operands = [None if tensor is None else unwrap(tensor, level) for tensor in tensors]
    levels.entered.pop()
    layer = pop_layer()
    try:
        result = rule(n, *operands)
    finally:
        push_layer(layer)
        levels.entered.append(ours)
    if result is None or isinstance(result, list):
        return otherwise(*tensors)
    value, dim = result
    return value if dim is None else attach(value, level, dim)


def run_chain(
    chain: Callable[[int, Operand, Callable[[Tensor], Operand], int], tuple[Operand, int]],
    x: Tensor,
    first: int,
) -> tuple[Tensor, int] | None:
    """Run ``chain(n, operand, look, first)`` on plain tensors; None where it gets nowhere.

    It tells how far it came.
    """
    if not is_direct():
        return None
    ours = level, n, _ = levels.entered[-1]
    operand = unwrap(x, level)
    levels.entered.pop()
    layer = pop_layer()
    try:
        (value, dim), reached = chain(n, operand, lambda tensor: unwrap(tensor, level), first)
    finally:
        push_layer(layer)
        levels.entered.append(ours)
    if reached == first:
        return None
    return (value if dim is None else attach(value, level, dim)), reached


def _rule_kernel(
    op: str, rules: Mapping[str, tuple[Rule, int]], otherwise: Kernel
) -> Callable[..., Any]:
    """The kernel that runs the op's rule below the innermost level if that is one of ours."""

    def rewrap(value: Tensor, dim: int | None, level: int) -> Tensor:
        wrapped: Tensor = value if dim is None else wrap(value, dim, level)
        return wrapped

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        entered = levels.entered
        if not entered or entered[-1][0] != current_level():
            return otherwise(keyset, *args, **options)
        ours = level, n, _state.of_rule = entered[-1]
        if type(ours) is Traced and ours.is_left_over():
            return otherwise(keyset, *args, **options)
        rule, num_tensors = rules[op]
        operands = [
            unwrap(arg, level)
            if isinstance(arg, Tensor)
            else [unwrap(tensor, level) for tensor in arg]
            if type(arg) is list and arg and isinstance(arg[0], Tensor)
            else arg
            for arg in args[:num_tensors]
        ]
        # Off the stack for the rule: its ops are plain ones, or belong to the level around ours.
        notes, start = _state.notes, perf_counter()
        entered.pop()
        layer = pop_layer()
        try:
            result = rule(n, *operands, *args[num_tensors:], **options)
        finally:
            push_layer(layer)
            entered.append(ours)
        if result is None:
            return otherwise(keyset, *args, **options)
        if notes is not None:
            notes.append(Note(op, "rule", rule.__name__, perf_counter() - start))
        if isinstance(result, list):  # several outputs
            return tuple(None if part is None else rewrap(*part, level) for part in result)
        return rewrap(*result, level)

    return kernel


def _member_kernel(op: str, by_member: Collection[str], otherwise: Kernel) -> Callable[..., Any]:
    """The kernel that runs an op for one member after another, on views of the stacked tensors.

    An op that writes into its first argument is computed for all members at once, and copied
    into it, if torch has a batching rule for its twin that doesn't write.
    """
    name, dot, kind = op.partition(".")
    in_place = name.endswith("_")
    twin_name = name.rstrip("_") + dot + kind
    twin = overload(twin_name) if in_place and twin_name not in by_member else None
    run = overload(op)
    assert run is not None

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        entered = levels.entered
        if not entered or entered[-1][0] != current_level():
            return otherwise(keyset, *args, **options)
        ours = level, n, randomness = entered[-1]
        if type(ours) is Traced and ours.is_left_over():
            return otherwise(keyset, *args, **options)
        call = (args, options)
        tensors = [leaf for _, leaf in leaves(call) if isinstance(leaf, Tensor)]
        operands = {id(tensor): detach(tensor, level) for tensor in tensors}
        if all(dim is None for _, dim in operands.values()):
            return otherwise(keyset, *args, **options)
        if in_place and operands[id(args[0])][1] is None:
            return otherwise(keyset, *args, **options)  # one tensor can't hold N results
        # What backward may need of the written tensor is kept apart from it.
        copies = in_place and (
            torch.is_grad_enabled() and any(value.requires_grad for value, _ in operands.values())
        )
        if twin is not None:
            result = twin(args[0].clone() if copies else args[0], *args[1:], **options)
            if not torch.can_cast(result.dtype, args[0].dtype):
                return otherwise(keyset, *args, **options)
            return args[0].copy_(result)
        notes, start = _state.notes, perf_counter()
        entered.pop()
        layer = pop_layer()
        try:
            columns = {
                key: [value] * n
                if dim is None
                else [value.select(dim, i) for i in range(n)]  # unbind's views can't be written to
                if in_place
                else value.unbind(dim)
                for key, (value, dim) in operands.items()
            }
            own_args = list(zip(*[_column(arg, columns, n) for arg in args], strict=True))
            own_options = {name: _column(arg, columns, n) for name, arg in options.items()}

            def run_member(i: int) -> Any:
                first, *rest = own_args[i]
                own = {name: column[i] for name, column in own_options.items()}
                return run(first.clone() if copies else first, *rest, **own)

            devices = rng.devices_of(value for value, _ in operands.values())
            results = for_each_member(run_member, n, randomness, devices)
            single = isinstance(results[0], Tensor)
            columns_out = [results] if single else list(zip(*results, strict=True))
            stacked = [
                None if parts[0] is None or (in_place and not copies) else torch.stack(parts)
                for parts in columns_out
            ]
            if copies and stacked[0] is not None:
                written, dim = operands[id(args[0])]
                written.movedim(dim or 0, 0).copy_(stacked[0])
        finally:
            push_layer(layer)
            entered.append(ours)
        if notes is not None:
            notes.append(Note(op, "member", "", perf_counter() - start))
        if in_place:
            return args[0]
        wrapped = tuple(None if value is None else attach(value, level) for value in stacked)
        return wrapped[0] if single else wrapped

    return kernel


def _column(arg: Any, columns: Mapping[int, Sequence[Tensor]], n: int) -> Sequence[Any]:
    """What each member gets for one argument: ops take tensors, lists of them, and numbers."""
    if isinstance(arg, Tensor):
        return columns[id(arg)]
    if isinstance(arg, list | tuple) and any(isinstance(item, Tensor) for item in arg):
        return [list(own) for own in zip(*[_column(item, columns, n) for item in arg], strict=True)]
    return [arg] * n


def for_each_member(
    run: Callable[[int], Any],
    n: int,
    randomness: Randomness,
    devices: Collection[torch.device],
) -> list[Any]:
    """``[run(0), ..., run(n - 1)]`` with the random numbers that ``randomness`` allows."""
    if randomness == "different":
        return [run(i) for i in range(n)]
    before = rng.get_state(devices)
    results = [run(0)]
    draws = not rng.is_equal(before, rng.get_state(devices))
    if draws and randomness == "error":
        rng.set_state(before)
        raise RuntimeError(
            'vmap: called random operation while in randomness error mode. Use randomness="same"'
            ' or "different", or draw the random numbers outside of the call.'
        )
    for i in range(1, n):
        if draws:
            rng.set_state(before)
        results.append(run(i))
    return results
