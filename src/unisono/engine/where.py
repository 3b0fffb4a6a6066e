"""Where in the user's model an error came from, what it says, and who called the ensemble."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn

# "<string>": code that Python itself generates, as for named tuples
_LIBRARIES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), "<string>")


def locate(error: BaseException, member: nn.Module) -> str:
    """The innermost of the member's modules in the traceback: ``rnn`` (LSTM)."""
    names = {id(module): path for path, module in member.named_modules()}
    found = ""
    step = error.__traceback__
    while step is not None:
        found = _module_of(step.tb_frame, names) or found
        step = step.tb_next
    return found or f"`{type(member).__name__}.forward`"


def place(member: nn.Module) -> tuple[str, str]:
    """What runs now: the innermost of the member's modules, and the line of the user's code."""
    names = {id(module): path for path, module in member.named_modules()}
    path = line = ""
    for frame in _frames():
        if not line and not frame.f_code.co_filename.startswith(_LIBRARIES):
            line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        path = path or _module_of(frame, names)
        if path and line:
            break
    return path or f"`{type(member).__name__}.forward`", line


def first_sentence(text: str) -> str:
    """Of an error's message, which in torch may be a page."""
    return text.partition("\n")[0].partition(". ")[0].rstrip(".")


def caller_level() -> int:
    """The ``stacklevel`` for a warning raised by our caller, pointing at the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    return level


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _module_of(frame: FrameType, names: dict[int, str]) -> str:
    owner = frame.f_locals.get("self")
    if id(owner) not in names:
        return ""
    path, kind = names[id(owner)], type(owner).__name__
    return f"`{path}` ({kind})" if path else f"`{kind}.forward`"
