"""Which objects are containers of tensors beyond Python's own.

A dataclass always is one. Any other object is one if a tensor can be reached through its
attributes, as in the cache of a language model or in a distribution. Modules, classes, functions
and enums never are.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

# Walked no further: they belong to the program, not to the value that refers to them.
_OPAQUE: Final = (
    *(nn.Module, type, Enum, ModuleType),
    *(FunctionType, BuiltinFunctionType, MethodType, torch.Generator),
)
_ATOMS: Final = (str, int, float, complex, bytes, type(None), torch.dtype, torch.device, torch.Size)
_FAR: Final = 10_000  # no output refers to more objects than that


def attributes_of(value: Any) -> list[tuple[str, Any]] | None:
    """Names and values of the attributes of an object that is a container; None if it isn't."""
    if isinstance(value, _OPAQUE):
        return None
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return list({**fields, **getattr(value, "__dict__", {})}.items())
    if getattr(value, "__dict__", None) and _reaches_tensor(value):
        # The batch shape follows from the tensors, see `fit_batch_shape`.
        hidden = "_batch_shape" if isinstance(value, Distribution) else None
        return [(key, item) for key, item in vars(value).items() if key != hidden]
    return None


def set_attributes(new: Any, items: Sequence[tuple[str, Any]]) -> None:
    """Give an object other attributes, whatever its class says to that."""
    for key, item in items:
        if key in getattr(new, "__dict__", ()):
            vars(new)[key] = item  # past properties of that name, and into a frozen dataclass
        else:
            object.__setattr__(new, key, item)


def rank_of(distribution: Distribution, key: str) -> int:
    """How many axes a parameter of a distribution has when it isn't left to broadcasting."""
    batch = len(distribution.batch_shape)
    if key in ("_unbroadcasted_cov_diag", "_capacitance_tril"):
        return batch + (1 if key == "_unbroadcasted_cov_diag" else 2)
    if key.startswith("_unbroadcasted"):
        return batch + 2
    return batch + len(distribution.event_shape)


def with_all_axes(new: Any, old: Any, rank: int) -> Any:
    """A parameter that got a member axis, with axes of length one for those it hasn't.

    A parameter (5,) in a batch of (7, 5) is to become (N, 1, 5), for (N, 5) would be broadcast
    along the wrong axes.
    """
    if not (isinstance(new, Tensor) and isinstance(old, Tensor)):
        return new
    if new.dim() != old.dim() + 1 or old.dim() >= rank:
        return new
    return new.reshape(new.shape[0], *[1] * (rank - old.dim()), *new.shape[1:])


def fit_batch_shape(
    new: Distribution, batch: torch.Size, before: Sequence[Any], after: Sequence[Any]
) -> None:
    """Let a distribution's batch shape follow its tensors where an axis 0 came or went."""
    for a, b in zip(before, after, strict=True):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            continue
        if b.dim() > a.dim():
            batch = torch.Size((b.shape[0], *batch))
        elif b.dim() < a.dim():
            batch = batch[1:]
        elif b.shape != a.shape:  # more or fewer members
            batch = torch.Size((b.shape[0], *batch[1:]))
        break
    vars(new)["_batch_shape"] = batch


def _reaches_tensor(value: Any) -> bool:
    seen = {id(value)}
    waiting = list(vars(value).values())
    while waiting and len(seen) < _FAR:
        item = waiting.pop()
        if isinstance(item, Tensor):
            return True
        if isinstance(item, _ATOMS) or isinstance(item, _OPAQUE) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple | set | frozenset | deque):
            waiting += item
        waiting += getattr(item, "__dict__", {}).values()
    return False
