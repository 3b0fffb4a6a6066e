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

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch._C import _functorch as ft

from unisono.engine.tree import leaves, tree_map

Randomness = Literal["different", "same", "error"]
Operand = tuple[Tensor, int | None]
"""A plain tensor and the place of its member axis; None if it is the same for all members."""

Rule = Callable[..., Operand | None]
"""``rule(n, *operands, *options)`` on plain tensors; None leaves the call to torch."""

_FRONT: Final = "FuncTorchDynamicLayerFrontMode"


class _Levels(threading.local):
    """The member axes entered by this thread, innermost last: (level, members, randomness)."""

    def __init__(self) -> None:
        self.entered: list[tuple[int, int, Randomness]] = []


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
        _levels.entered.append((level, self.n, self.randomness))
        return level

    def __exit__(self, *error: object) -> None:
        _levels.entered.pop()
        ft._vmap_decrement_nesting()


def attach(tensor: Tensor, level: int, dim: int = 0) -> Tensor:
    """Hide the member axis ``dim`` of a stacked tensor: (N, *s) -> (*s) inside the level."""
    wrapped: Tensor = ft._add_batch_dim(tensor, dim, level)
    return wrapped


def detach(tensor: Tensor, level: int) -> Operand:
    """Undo `attach`: the plain tensor and its member axis, None if members don't differ."""
    operand: Operand = ft._unwrap_batched(tensor, level)
    return operand


def install(rules: Mapping[str, tuple[Rule, int]], by_member: Sequence[str]) -> None:
    """Register the rules with torch, once per process.

    Args:
        rules: For each op (``"linear"``, ``"conv2d.padding"``) the rule and the number of its
            leading arguments that are tensors.
        by_member: Ops that are to run for one member after another.
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
            for op in (*rules, *by_member):
                kernel = _rule_kernel(op, rules) if op in rules else _member_kernel(op)
                library.impl(op, kernel, _FRONT, with_keyset=True)  # type: ignore[no-untyped-call]
        _library = library


def _rule_kernel(op: str, rules: Mapping[str, tuple[Rule, int]]) -> Callable[..., Any]:
    """The kernel that runs the op's rule below the innermost level if that is one of ours."""
    torch_kernel = torch.library.get_kernel(f"aten::{op}", _FRONT)
    current_level, unwrap, wrap = ft.maybe_current_level, ft._unwrap_batched, ft._add_batch_dim
    pop, push = ft.pop_dynamic_layer_stack, ft.push_dynamic_layer_stack

    def kernel(keyset: Any, *args: Any, **options: Any) -> Any:
        entered = _levels.entered
        if not entered or entered[-1][0] != current_level():
            return torch_kernel.call_boxed(keyset, *args, **options)
        ours = level, n, _ = entered[-1]
        rule, num_tensors = rules[op]
        operands = [None if arg is None else unwrap(arg, level) for arg in args[:num_tensors]]
        # Off the stack for the rule: its ops are plain ones, or belong to the level around ours.
        entered.pop()
        layer = pop()
        try:
            result = rule(n, *operands, *args[num_tensors:], **options)
        finally:
            push(layer)
            entered.append(ours)
        if result is None:
            return torch_kernel.call_boxed(keyset, *args, **options)
        value, dim = result
        return value if dim is None else wrap(value, dim, level)

    return kernel


def _member_kernel(op: str) -> Callable[..., Any]:
    """The kernel that runs an op for one member after another, on views of the stacked tensors."""
    torch_kernel = torch.library.get_kernel(f"aten::{op}", _FRONT)
    name, _, overload = op.partition(".")
    run = getattr(getattr(torch.ops.aten, name), overload or "default")

    def kernel(keyset: Any, *args: Any) -> Any:
        entered = _levels.entered
        if not entered or entered[-1][0] != ft.maybe_current_level():
            return torch_kernel.call_boxed(keyset, *args)
        ours = level, n, randomness = entered[-1]
        tensors = [leaf for _, leaf in leaves(args) if isinstance(leaf, Tensor)]
        operands = {id(tensor): detach(tensor, level) for tensor in tensors}
        if randomness != "different" or all(dim is None for _, dim in operands.values()):
            return torch_kernel.call_boxed(keyset, *args)
        entered.pop()
        layer = ft.pop_dynamic_layer_stack()
        try:
            columns = {
                key: [value] * n if dim is None else value.unbind(dim)
                for key, (value, dim) in operands.items()
            }
            results = [run(*_of_member(args, columns, i)) for i in range(n)]
            single = isinstance(results[0], Tensor)
            columns_out = [results] if single else list(zip(*results, strict=True))
            stacked = [None if parts[0] is None else torch.stack(parts) for parts in columns_out]
        finally:
            ft.push_dynamic_layer_stack(layer)
            entered.append(ours)
        wrapped = tuple(None if value is None else attach(value, level) for value in stacked)
        return wrapped[0] if single else wrapped

    return kernel


def _of_member(args: tuple[Any, ...], columns: Mapping[int, Sequence[Tensor]], i: int) -> Any:
    return tree_map(lambda leaf: columns[id(leaf)][i] if isinstance(leaf, Tensor) else leaf, args)


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
