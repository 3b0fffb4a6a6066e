"""``torch.autograd.Function`` inside a forward that runs op by op.

torch refuses a Function without ``setup_context`` or ``vmap`` inside the member axis, and calls
``apply`` past every mode. So for the time of such a call ``apply`` is exchanged: one for the
process, which passes on whatever doesn't belong to a call of ours.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from unisono.engine.opbyop.detour import Detours

_FUNCTION: Any = torch.autograd.Function


class FunctionsByMember:
    """Let ``detours`` run this thread's autograd Functions for the time of a ``with`` block."""

    _lock = threading.Lock()
    _inside = 0
    _original: tuple[Any, ...] = ()  # in a tuple, which doesn't bind it to this class
    _of_thread = threading.local()

    def __init__(self, detours: Detours) -> None:
        self._detours = detours

    def __enter__(self) -> None:
        kind = FunctionsByMember
        self._outer = getattr(kind._of_thread, "detours", None)
        kind._of_thread.detours = self._detours
        with kind._lock:
            if kind._inside == 0:
                kind._original = (vars(_FUNCTION)["apply"],)
                _FUNCTION.apply = classmethod(_apply)
            kind._inside += 1

    def __exit__(self, *_: object) -> None:
        kind = FunctionsByMember
        kind._of_thread.detours = self._outer
        with kind._lock:
            kind._inside -= 1
            if kind._inside == 0:
                _FUNCTION.apply = kind._original[0]


def _apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    detours = getattr(FunctionsByMember._of_thread, "detours", None)
    original = FunctionsByMember._original[0].__get__(None, cls)
    if detours is None:
        return original(*args, **kwargs)
    return detours.run(original, args, kwargs)
