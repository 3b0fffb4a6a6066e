"""Where in the user's model an error came from, and who called the ensemble."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

_LIBRARIES = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def locate(error: BaseException, member: nn.Module) -> str:
    """The innermost of the member's modules in the traceback: ``rnn`` (LSTM)."""
    names = {id(module): path for path, module in member.named_modules()}
    found = ""
    step = error.__traceback__
    while step is not None:
        owner = step.tb_frame.f_locals.get("self")
        if id(owner) in names:
            path, kind = names[id(owner)], type(owner).__name__
            found = f"`{path}` ({kind})" if path else f"`{kind}.forward`"
        step = step.tb_next
    return found or f"`{type(member).__name__}.forward`"


def caller_level() -> int:
    """The ``stacklevel`` for a warning raised by our caller, pointing at the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    return level
