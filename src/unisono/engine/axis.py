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
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch._C import _functorch as ft

Randomness = Literal["different", "same", "error"]
Operand = tuple[Tensor, int | None]
"""A plain tensor and the place of its member axis; None if it is the same for all members."""

Rule = Callable[..., Operand | None]
"""``rule(n, *operands, *options)`` on plain tensors; None leaves the call to torch."""

_FRONT: Final = "FuncTorchDynamicLayerFrontMode"


class _Levels(threading.local):
    """The member axes entered by this thread, innermost last: (level, number of members)."""

    def __init__(self) -> None:
        self.entered: list[tuple[int, int]] = []


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
        _levels.entered.append((level, self.n))
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


def install(rules: Mapping[str, tuple[Rule, int]]) -> None:
    """Register the rules with torch, once per process.

    Args:
        rules: For each op (``"linear"``, ``"conv2d.padding"``) the rule and the number of its
            leading arguments that are tensors.
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
            for op in rules:
                kernel = _kernel(op, rules)
                library.impl(op, kernel, _FRONT, with_keyset=True)  # type: ignore[no-untyped-call]
        _library = library


def _kernel(op: str, rules: Mapping[str, tuple[Rule, int]]) -> Callable[..., Any]:
    """The kernel that runs the op's rule below the innermost level if that is one of ours."""
    torch_kernel = torch.library.get_kernel(f"aten::{op}", _FRONT)
    current_level, unwrap, wrap = ft.maybe_current_level, ft._unwrap_batched, ft._add_batch_dim
    pop, push = ft.pop_dynamic_layer_stack, ft.push_dynamic_layer_stack

    def kernel(keyset: Any, *args: Any) -> Any:
        entered = _levels.entered
        if not entered or entered[-1][0] != current_level():
            return torch_kernel.call_boxed(keyset, *args)
        level, n = entered[-1]
        rule, num_tensors = rules[op]
        operands = [None if arg is None else unwrap(arg, level) for arg in args[:num_tensors]]
        # Off the stack for the rule: its ops are plain ones, or belong to the level around ours.
        entered.pop()
        layer = pop()
        try:
            result = rule(n, *operands, *args[num_tensors:])
        finally:
            push(layer)
            entered.append((level, n))
        if result is None:
            return torch_kernel.call_boxed(keyset, *args)
        value, dim = result
        return value if dim is None else wrap(value, dim, level)

    return kernel


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
