"""Enter and leave the member axis: the only file that knows torch's private names.

Inside ``member_axis(n)`` a tensor that was passed through `attach` looks to the model like the
tensor of one member, while it holds all of them. Every op then goes through functorch's batching
rules, except where `install` has put a rule of ours in front of them.

The rules sit at the dispatch key ``FuncTorchDynamicLayerFrontMode``: it is the first one reached
inside a transform, so a rule there sees ``linear`` or ``batch_norm`` before torch takes them
apart, and it is not reached at all outside of one. The registration is process-wide (torch has no
other kind), so every rule first asks whether the innermost level is one that this thread entered
here; for everybody else torch's own kernel is called.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from time import perf_counter
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._C import _functorch as ft
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

from unisono.engine import rng
from unisono.engine.tree import leaves, tree_map

Randomness = Literal["different", "same", "error"]
Operand = tuple[Tensor, int | None]
"""A plain tensor and the place of its member axis; None if it is the same for all members."""

Rule = Callable[..., Operand | list[Operand | None] | None]
"""``rule(n, *operands, *options)`` on plain tensors; None leaves the call to torch.

A list is for an op with several outputs.
"""

Kernel = Callable[..., Any]
"""``kernel(keyset, *args, **options)``."""

_BATCH_NORM: Final = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})
_FRONT: Final = "FuncTorchDynamicLayerFrontMode"


class Note(NamedTuple):
    """One op that a kernel of ours ran."""

    op: str
    how: Literal["rule", "member"]
    rule: str
    seconds: float


class _Levels(threading.local):
    """The member axes entered by this thread, innermost last: (level, members, randomness)."""

    def __init__(self) -> None:
        self.entered: list[tuple[int, int, Randomness]] = []
        self.of_rule: Randomness = "different"  # what holds for the rule that runs
        self.notes: list[Note] | None = None  # what ran how, while somebody asks


_levels = _Levels()
_install_lock = threading.Lock()
_library: torch.library.Library | None = None


class member_axis:
    """Enter one level of N members; gives the level that `attach` and `detach` take."""

    __slots__ = ("n", "randomness")

    def __init__(self, n: int, randomness: Randomness) -> None:
        self.n = n
        self.randomness = randomness

    def __enter__(self) -> int:
        level: int = ft._vmap_increment_nesting(self.n, self.randomness)
        _enter((level, self.n, self.randomness))
        return level

    def __exit__(self, *error: object) -> None:
        _levels.entered.pop()
        ft._vmap_decrement_nesting()


def at_trace_time(fn: Callable[[], bool]) -> Callable[[], bool]:
    """Let Dynamo run ``fn`` itself where it meets a call of it, and take the result as constant.

    `torch.compiler.assume_constant_result` does the same, but imports Dynamo, which takes seconds.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def rules_start(randomness: Randomness) -> None:
    """Let the rules hold in the level that a traced ``torch.vmap`` has entered.

    Dynamo puts the calls of this function and of `rules_end` into the graph that it makes. They
    run whenever that graph is traced further, and leave nothing in what is compiled.
    """
    layer = ft.peek_interpreter_stack()
    _enter(_Traced((layer.level(), ft.CVmapInterpreterPtr(layer).batchSize(), randomness)))


def rules_end() -> None:
    """Undo `rules_start`."""
    _levels.entered.pop()


def _enter(entry: tuple[int, int, Randomness]) -> None:
    entered = _levels.entered
    while entered and entered[-1][0] >= entry[0]:  # from a trace that failed halfway
        entered.pop()
    entered.append(entry)


class _Traced(tuple[int, int, Randomness]):
    """A level entered by `rules_start`, which nobody leaves if the trace fails halfway."""

    def is_left_over(self) -> bool:
        """Whether the innermost level is somebody else's, to whom the rules must not apply."""
        layer = ft.peek_interpreter_stack()
        if layer.key() != ft.TransformType.Vmap:
            return True
        return bool(ft.CVmapInterpreterPtr(layer).batchSize() != self[1])


def set_native_attention(on: bool) -> bool:
    """What `torch.backends.mha.set_fastpath_enabled` does, as Dynamo can trace it; what it was."""
    was: bool = torch.backends.mha._is_fastpath_enabled
    torch.backends.mha._is_fastpath_enabled = on
    return was


def attach(tensor: Tensor, level: int, dim: int = 0) -> Tensor:
    """Hide the member axis ``dim`` of a stacked tensor: (N, *s) -> (*s) inside the level."""
    wrapped: Tensor = ft._add_batch_dim(tensor, dim, level)
    return wrapped


def attach_all(tensors: Sequence[Tensor], level: int) -> list[Tensor]:
    """`attach` for each of the tensors, which carry the member axis in front."""
    wrap = ft._add_batch_dim
    return [wrap(tensor, 0, level) for tensor in tensors]


def detach(tensor: Tensor, level: int) -> Operand:
    """Undo `attach`: the plain tensor and its member axis, None if members don't differ."""
    operand: Operand = ft._unwrap_batched(tensor, level)
    return operand


def is_innermost(level: int) -> bool:
    """Whether no other transform was entered inside this level."""
    return bool(ft.maybe_current_level() == level)


@contextmanager
def below() -> Iterator[None]:
    """Leave the innermost level, which is one of ours, for the time of a ``with`` block."""
    ours = _levels.entered.pop()
    layer = ft.pop_dynamic_layer_stack()
    try:
        yield
    finally:
        ft.push_dynamic_layer_stack(layer)
        _levels.entered.append(ours)


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
                if _overload(op) is None:
                    continue
                kernel: Kernel = torch.library.get_kernel(f"aten::{op}", _FRONT).call_boxed
                if op in by_member:
                    kernel = _member_kernel(op, by_member, kernel)
                if op in rules:
                    kernel = _rule_kernel(op, rules, kernel)
                library.impl(op, kernel, _FRONT, with_keyset=True)  # type: ignore[no-untyped-call]
        _library = library


@contextmanager
def noted() -> Iterator[list[Note]]:
    """Collect what the kernels of this thread run inside the ``with`` block."""
    outer, _levels.notes = _levels.notes, []
    try:
        yield _levels.notes
    finally:
        _levels.notes = outer


def draws_independently() -> bool:
    """For a rule: whether each member is to draw random numbers of its own."""
    return _levels.of_rule == "different"


def run_rule(rule: Rule, otherwise: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Run a rule without the way through torch's dispatcher; ``otherwise`` where that matters.

    It does where somebody listens (a mode, `noted`), and outside of a level of ours.
    """
    entered = _levels.entered
    if not entered or _levels.notes is not None or torch._C._len_torch_function_stack():
        return otherwise(*tensors)
    ours = level, n, _ = entered[-1]
    if level != ft.maybe_current_level():
        return otherwise(*tensors)
    unwrap = ft._unwrap_batched
    operands = [None if tensor is None else unwrap(tensor, level) for tensor in tensors]
    entered.pop()
    layer = ft.pop_dynamic_layer_stack()
    try:
        result = rule(n, *operands)
    finally:
        ft.push_dynamic_layer_stack(layer)
        entered.append(ours)
    if result is None or isinstance(result, list):
        return otherwise(*tensors)
    value, dim = result
    return value if dim is None else attach(value, level, dim)


def _overload(op: str) -> Callable[..., Any] | None:
    """``torch.ops.aten.conv2d.padding`` for ``"conv2d.padding"``; None if torch has no such op."""
    if not torch._C._dispatch_has_kernel(f"aten::{op}"):
        return None
    name, _, overload = op.partition(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, name), overload or "default")
    return found


def _rule_kernel(
    op: str, rules: Mapping[str, tuple[Rule, int]], otherwise: Kernel
) -> Callable[..., Any]:
    """The kernel that runs the op's rule below the innermost level if that is one of ours."""
    current_level, unwrap, wrap = ft.maybe_current_level, ft._unwrap_batched, ft._add_batch_dim
    pop, push = ft.pop_dynamic_layer_stack, ft.push_dynamic_layer_stack

    def rewrap(value: Tensor, dim: int | None, level: int) -> Tensor:
        wrapped: Tensor = value if dim is None else wrap(value, dim, level)
        return wrapped

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        entered = _levels.entered
        if not entered or entered[-1][0] != current_level():
            return otherwise(keyset, *args, **options)
        ours = level, n, _levels.of_rule = entered[-1]
        if type(ours) is _Traced and ours.is_left_over():
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
        notes, start = _levels.notes, perf_counter()
        entered.pop()
        layer = pop()
        try:
            result = rule(n, *operands, *args[num_tensors:], **options)
        finally:
            push(layer)
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
    name, dot, overload = op.partition(".")
    in_place = name.endswith("_")
    twin_name = name.rstrip("_") + dot + overload
    twin = _overload(twin_name) if in_place and twin_name not in by_member else None
    run = _overload(op)
    assert run is not None

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        entered = _levels.entered
        if not entered or entered[-1][0] != ft.maybe_current_level():
            return otherwise(keyset, *args, **options)
        ours = level, n, randomness = entered[-1]
        if type(ours) is _Traced and ours.is_left_over():
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
        notes, start = _levels.notes, perf_counter()
        entered.pop()
        layer = ft.pop_dynamic_layer_stack()
        try:
            columns = {
                key: [value] * n
                if dim is None
                else [value.select(dim, i) for i in range(n)]  # unbind's views can't be written to
                if in_place
                else value.unbind(dim)
                for key, (value, dim) in operands.items()
            }

            def run_member(i: int) -> Any:
                own_args, own_options = tree_map(
                    lambda leaf: columns[id(leaf)][i] if isinstance(leaf, Tensor) else leaf, call
                )
                if copies:
                    own_args = (own_args[0].clone(), *own_args[1:])
                return run(*own_args, **own_options)

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
            ft.push_dynamic_layer_stack(layer)
            entered.append(ours)
        if notes is not None:
            notes.append(Note(op, "member", "", perf_counter() - start))
        if in_place:
            return args[0]
        wrapped = tuple(None if value is None else attach(value, level) for value in stacked)
        return wrapped[0] if single else wrapped

    return kernel


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


def registered_node(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    """The children of an object registered with torch as a pytree node, and how to rebuild it."""
    definition = pytree.SUPPORTED_NODES.get(type(value))
    if definition is None:
        return None
    children, context = definition.flatten_fn(value)
    return list(children), lambda new: definition.unflatten_fn(new, context)


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters by name; writing into the dict skips ``__setattr__``."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by name; writing into the dict skips ``__setattr__``."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's own submodules by name, one entry for each name."""
    return module._modules


def non_persistent_buffers_of(module: nn.Module) -> set[str]:
    """Names of the module's own buffers that its ``state_dict`` leaves out."""
    return module._non_persistent_buffers_set


def hooks_of(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], ...]:
    """The module's own hooks by handle: before and after forward, before and after backward."""
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


def is_observed() -> bool:
    """Whether this thread runs inside a transform, a dispatch mode or hooks for saved tensors.

    They see every op (activation checkpointing counts the tensors that are saved), so nothing
    may run there that isn't part of the call itself.
    """
    return (
        ft.maybe_current_level() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def written_arguments(op: Any, args: Sequence[Any]) -> tuple[tuple[int, str], ...]:
    """Place and name of each argument that a call of the op (an ``OpOverload``) writes to."""
    if op.overloadpacket.__name__ in _BATCH_NORM:
        # They update the running statistics, which their schemas don't say.
        return ((3, "running_mean"), (4, "running_var")) if args[5] else ()
    return _marked_arguments(op)


@functools.cache
def _marked_arguments(op: Any) -> tuple[tuple[int, str], ...]:
    return tuple(
        (k, argument.name)
        for k, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def is_end_of_recomputation(error: Exception) -> bool:
    """Whether the error only says that activation checkpointing has recomputed all it needs."""
    return isinstance(error, torch.utils.checkpoint._StopRecomputationError)


def without_modes() -> AbstractContextManager[None]:
    """Let no `TorchFunctionMode` see what runs in a ``with`` block."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context
