"""Refuse what would leave tensors of the member axis in places where nobody can reach them.

A tensor that leaves the member axis without being joined is dead: it has the shape of one member
and no values that could be read. Better an error than such a tensor.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from types import FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from unisono.engine.inputs import PerMember
from unisono.engine.parts import Call
from unisono.engine.tree import leaves
from unisono.errors import UnsupportedModelError

_HOLDS_NOTHING: Final = (
    *(str, int, float, complex, bytes, type(None), type, ModuleType, nn.Module),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator),
)
_KEPT: Final = (Tensor, PerMember, str, int, float, type(None))  # forward can't put anything there
_FAR: Final = 1000


def check_leaf(leaf: Any, is_of_members: Callable[[Tensor], bool]) -> None:
    """Refuse an output that isn't a container and yet holds tensors with values per member."""
    if isinstance(leaf, _HOLDS_NOTHING):
        return
    if any(is_of_members(tensor) for tensor in _tensors_in(leaf)):
        raise UnsupportedModelError(
            f"ens(...): forward returns tensors inside a {type(leaf).__name__}, where they can't be"
            f" given a member axis; return them in a tuple, dict or dataclass, or as attributes of"
            f" an object"
        )


def check_arguments(call: Call, is_of_members: Callable[[Tensor], bool]) -> None:
    """Refuse a forward that puts tensors into a container that the caller passed in."""
    for where, arg in (*enumerate(call.args), *call.kwargs.items()):
        if isinstance(arg, _KEPT):
            continue
        for path, leaf in leaves(arg):
            if isinstance(leaf, Tensor) and is_of_members(leaf):
                name = f"args[{where}]" if isinstance(where, int) else where
                raise UnsupportedModelError(
                    f"ens(...): forward puts a tensor of the members into {name}{path}, in a"
                    f" {type(arg).__name__} that all members share; make it inside of the call:"
                    f" ens.run(lambda member, x: member(x, {type(arg).__name__}(...)), x)"
                )


def _tensors_in(leaf: Any) -> Iterator[Tensor]:
    seen: dict[int, Any] = {}
    waiting = [leaf]
    while waiting and len(seen) < _FAR:
        item = waiting.pop()
        if isinstance(item, Tensor):
            yield item
        elif not isinstance(item, _HOLDS_NOTHING) and id(item) not in seen:
            seen[id(item)] = item
            waiting += _referents(item)


def _referents(item: Any) -> list[Any]:
    """What an object holds itself; not the globals that a function refers to."""
    if isinstance(item, FunctionType):
        cells = [cell.cell_contents for cell in item.__closure__ or () if _is_filled(cell)]
        return [*cells, *(item.__defaults__ or ()), *(item.__kwdefaults__ or {}).values()]
    if isinstance(item, MethodType):
        return [item.__self__]
    if isinstance(item, functools.partial):
        return [item.func, *item.args, *item.keywords.values()]
    if isinstance(item, GeneratorType):
        return [] if item.gi_frame is None else list(item.gi_frame.f_locals.values())
    return gc.get_referents(item)


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
