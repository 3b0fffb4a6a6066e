"""Enter and leave the member axis: the only file that knows torch's private names.

Inside ``member_axis(n)`` a tensor that was passed through `attach` looks to the model like the
tensor of one member, while it holds all of them. Every op then goes through functorch's batching
rules, except where `kernels.py` has put something better in front of them.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Literal

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._C import _functorch as ft
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

Randomness = Literal["different", "same", "error"]
Operand = tuple[Tensor, int | None]
"""A plain tensor and the place of its member axis; None if it is the same for all members."""

Rule = Callable[..., Operand | list[Operand | None] | None]
"""``rule(n, *operands, *options)`` on plain tensors; None leaves the call to torch.

A list is for an op with several outputs.
"""

# Ops that runtimes know for other shapes than those of stacked tensors.
_TAKEN_APART: Final = (torch.ops.aten._prelu_kernel.default,)
_BATCH_NORM: Final = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})
FRONT: Final = "FuncTorchDynamicLayerFrontMode"
"""The dispatch key at which torch itself intercepts composite ops inside a transform."""


class _Levels(threading.local):
    """The member axes entered by this thread, innermost last: (level, members, randomness)."""

    def __init__(self) -> None:
        self.entered: list[tuple[int, int, Randomness]] = []


levels = _Levels()

# For `kernels.py`, where a Python function around each would be felt.
current_level = ft.maybe_current_level
unwrap = ft._unwrap_batched
wrap = ft._add_batch_dim
pop_layer = ft.pop_dynamic_layer_stack
push_layer = ft.push_dynamic_layer_stack
count_modes = torch._C._len_torch_function_stack


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
        levels.entered.pop()
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
    _enter(Traced((layer.level(), ft.CVmapInterpreterPtr(layer).batchSize(), randomness)))


def rules_end() -> None:
    """Undo `rules_start`."""
    levels.entered.pop()


def _enter(entry: tuple[int, int, Randomness]) -> None:
    entered = levels.entered
    while entered and entered[-1][0] >= entry[0]:  # from a trace that failed halfway
        entered.pop()
    entered.append(entry)


class Traced(tuple[int, int, Randomness]):
    """A level entered by `rules_start`, which nobody leaves if the trace fails halfway."""

    def is_left_over(self) -> bool:
        """Whether the innermost level is somebody else's, to whom the rules must not apply."""
        layer = ft.peek_interpreter_stack()
        if layer.key() != ft.TransformType.Vmap:
            return True
        return bool(ft.CVmapInterpreterPtr(layer).batchSize() != self[1])


@contextmanager
def outside_of_export() -> Iterator[None]:
    """Inside of ``torch.export``: let it see nothing of what runs in a ``with`` block."""
    from torch.utils._python_dispatch import _disable_current_modes

    with torch._C.DisableTorchFunction(), _disable_current_modes():
        yield


def record(fn: Callable[..., Sequence[Any]], tensors: Sequence[Tensor]) -> torch.fx.GraphModule:
    """The ops that ``fn(*tensors)`` comes to, on tensors of ``torch.export``, with its sizes.

    To be called `outside_of_export`. The ops are those that reach the device, as in `capture`;
    composite ones are taken apart by what torch has in Python for that, which knows sizes that
    aren't fixed.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import make_fx

    fake = detect_fake_mode(list(tensors)) or nullcontext()  # for tensors that forward makes
    table = torch.export.default_decompositions()
    apart = {op: table[op] for op in _TAKEN_APART if op in table}
    make = make_fx(fn, apart, _allow_non_fake_inputs=True, record_stack_traces=True)
    with fake, enable_python_dispatcher(), torch.fx.traceback.preserve_node_meta():
        traced = make(*tensors)
    graph: torch.fx.GraphModule = traced
    return graph


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
    ours = levels.entered.pop()
    layer = ft.pop_dynamic_layer_stack()
    try:
        yield
    finally:
        ft.push_dynamic_layer_stack(layer)
        levels.entered.append(ours)


def overload(op: str) -> Callable[..., Any] | None:
    """``torch.ops.aten.conv2d.padding`` for ``"conv2d.padding"``; None if torch has no such op."""
    if not torch._C._dispatch_has_kernel(f"aten::{op}"):
        return None
    name, _, kind = op.partition(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, name), kind or "default")
    return found


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


FLAT_WEIGHTS: Final = frozenset({"_flat_weights", "_flat_weight_refs"})
"""What a recurrent layer keeps of its own parameters, and makes anew when it finds others."""


def trust_flat_weights(module: nn.RNNBase) -> None:
    """Let a recurrent layer take its flat list of weights as it stands.

    Before each call it looks whether its parameters are still those of the list, and makes the
    list anew if not. Of a weight that it has no reference to it takes the one in the list.
    """
    module._flat_weight_refs = [None] * len(module._flat_weights)


def hooks_of(module: nn.Module) -> tuple[dict[int, Callable[..., Any]], ...]:
    """The module's own hooks by handle: before and after forward, before and after backward."""
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


def has_global_hooks() -> bool:
    """Whether hooks are registered that run for every module of the process."""
    home = nn.modules.module
    return bool(
        home._global_forward_hooks
        or home._global_forward_pre_hooks
        or home._global_backward_hooks
        or home._global_backward_pre_hooks
    )


def is_observed() -> bool:
    """Whether this thread runs inside a transform, a dispatch mode or hooks for saved tensors.

    They see every op (activation checkpointing counts the tensors that are saved), so nothing
    may run there that isn't part of the call itself.
    """
    return (
        is_transformed()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )


def is_transformed() -> bool:
    """Whether this thread runs inside a transform."""
    return ft.maybe_current_level() is not None


def has_tangents() -> bool:
    """Whether forward-mode differentiation goes on, which knows no ``out=``."""
    return torch.autograd.forward_ad._current_level >= 0


def backward_pass() -> int:
    """A number for the pass backwards in which this thread is."""
    number: int = torch._C._current_graph_task_id()
    return number


def is_unheld(tensor: Tensor) -> bool:
    """Whether no other tensor, view, array or storage object has the memory of this one."""
    storage = tensor.untyped_storage()
    # Of the memory, one count is the tensor's, the other that of the storage object; of that
    # object, one is torch's, one the name here, and one the argument of `getrefcount`.
    holders: int = torch._C._storage_Use_Count(storage._cdata)
    return holders <= 2 and sys.getrefcount(storage) <= 3


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


def pass_checkpoints(is_inside: Callable[[], bool]) -> None:
    """Let `torch.utils.checkpoint` run its function and do nothing else where ``is_inside()``.

    Everywhere else it does what it always did.
    """
    module = torch.utils.checkpoint
    generator = module._checkpoint_without_reentrant_generator
    apply: Callable[..., Any] = module.CheckpointFunction.apply

    @functools.wraps(generator)
    def without_reentrance(*args: Any, **kwargs: Any) -> Iterator[None]:
        return iter((None,)) if is_inside() else generator(*args, **kwargs)

    def with_reentrance(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args) if is_inside() else apply(function, preserve, *args)

    module._checkpoint_without_reentrant_generator = without_reentrance
    module.CheckpointFunction.apply = with_reentrance  # type: ignore[method-assign]


def without_modes() -> AbstractContextManager[None]:
    """Let no `TorchFunctionMode` see what runs in a ``with`` block."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context
