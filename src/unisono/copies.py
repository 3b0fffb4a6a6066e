"""What a copy carries over: the part of an object or a module that can tell two of them apart."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

import torch
from torch import nn

UNREADABLE: Final = object()
_PLAIN_OBJECT = object().__reduce_ex__(4)[0]  # the standard way to copy an object
# The rest of nn.Module's own is compared apart, or is not carried over by a copy.
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"_is_full_backward_hook"} | {"_compiled_call_impl"}


def carried(value: object) -> object:
    """Return what a copy would get of an object, by name where it's that simple.

    Args:
        value: Any object but a module or a tensor.

    Returns:
        A dictionary of its attributes; for an object with a way of its own to be copied, some value
        to compare by; `UNREADABLE` if it has no copies, and no attributes either.

    Example:
        >>> class Config:
        ...     def __init__(self):
        ...         self.width = 4
        >>> carried(Config())
        {'width': 4}
    """
    if isinstance(value, torch.fx.Graph):
        return str(value)  # copying one leaves out how it was traced
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:
        return getattr(value, "__dict__", UNREADABLE)
    if isinstance(reduced, str):
        return reduced
    make, args, state, items, pairs = (*reduced, None, None, None)[:5]
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # has slots
        state = {**(state[0] or {}), **state[1]}
    simple = make is _PLAIN_OBJECT and len(args) == 1 and not (items or pairs)
    if simple and (state is None or isinstance(state, dict)):
        return state or {}
    return [make, args, state, list(items or ()), list(pairs or ())]


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return the attributes that a copy of the module would have, without nn.Module's own."""
    state = vars(module)
    reduce: Any = type(module).__getstate__
    if reduce is not nn.Module.__getstate__:
        # nn.LSTM and Lightning leave out what belongs to this one object. Parametrised modules
        # refuse to be pickled, but not to be copied.
        with suppress(Exception):
            left = reduce(module)
            state = left if isinstance(left, dict) else state
    return {name: value for name, value in state.items() if name not in _OF_EVERY_MODULE}
