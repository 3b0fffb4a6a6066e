"""What a function of torch is called, makes and writes into, by torch's conventions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.overrides import resolve_name

# What they make is made for each member, so that it can be written to in place.
MAKES_TENSORS: Final = frozenset(
    {
        *(torch.zeros, torch.ones, torch.empty, torch.full, torch.eye, torch.tensor),
        *(torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like),
        *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full),
        *(Tensor.new_tensor, Tensor.clone, torch.clone),
    }
)

# What they do to a part of a tensor isn't done to the whole.
NOT_OF_PARTS: Final = ("__set__", "__delete__", "set_", "resize_", "resize_as_")

_NOT_IN_PLACE: Final = ("__int__", "__index__", "__invert__", "__iter__", "__init__")


def name_of(func: Callable[..., Any], call: Any = ((), {})) -> str:
    """How the user would call it: ``Tensor.item``, ``torch.where``, ``MyFunction.apply``."""
    if getattr(func, "__name__", "") in ("__getitem__", "__setitem__") and len(call[0]) > 1:
        index = call[0][1] if isinstance(call[0][1], tuple) else (call[0][1],)
        kinds = {leaf.dtype for leaf in index if isinstance(leaf, Tensor)}
        how = "boolean mask" if torch.bool in kinds else "tensor" if kinds else "slice"
        done = "writing" if func.__name__ == "__setitem__" else "indexing"
        return f"{done} with a {how}"
    owner = getattr(func, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return f"{owner.__name__}.apply"
    name = resolve_name(func) or getattr(func, "__qualname__", "") or repr(func)
    name = name.replace("torch.functional.", "torch.").replace("TensorBase", "Tensor")
    return name.removeprefix("torch.") if ".Tensor." in name else name


def written_by(func: Callable[..., Any], call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The tensor that a function writes into, by torch's conventions; None if it doesn't."""
    args, kwargs = call
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]
    name = getattr(func, "__name__", "")
    writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    writes = writes or (name.startswith("__i") and name not in _NOT_IN_PLACE)
    if not writes:  # F.elu(x, 1.0, True)
        code = getattr(func, "__code__", None)
        names = code.co_varnames[: code.co_argcount] if code is not None else ()
        writes = bool({**dict(zip(names, args, strict=False)), **kwargs}.get("inplace"))
    return next((arg for arg in args if isinstance(arg, Tensor)), None) if writes else None
