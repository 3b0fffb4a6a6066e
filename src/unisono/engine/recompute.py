"""Activation checkpointing inside of a member, which can't be done, and is left out.

``torch.utils.checkpoint`` throws intermediate results away and runs a part of ``forward`` once
more in backward. By then the call is over: the template has no tensors, and the member axis is
left. So while a call runs, that part runs as if there were no checkpoint: the same outputs and
gradients, without the saving of memory. Around the ensemble checkpointing works as always.
"""

from __future__ import annotations

import threading
import warnings

from unisono.engine.axis import pass_checkpoints
from unisono.engine.where import caller_level
from unisono.errors import EnsembleWarning

_TEXT = (
    "ens(...): a member calls torch.utils.checkpoint, which saves no memory inside of an ensemble:"
    " the results are kept. To save it, checkpoint the ensemble instead:\n\n"
    "    checkpoint(ens, x, use_reentrant=False)"
)


class _Calls(threading.local):
    """How many calls of ensembles run in this thread, one inside the other."""

    def __init__(self) -> None:
        self.running = 0


calls = _Calls()
_install_lock = threading.Lock()
_is_installed = False


def leave_out_checkpoints() -> None:
    """From now on, in this process, let checkpoints inside of our calls do nothing."""
    global _is_installed
    with _install_lock:
        if not _is_installed:
            pass_checkpoints(_is_inside)
            _is_installed = True


def _is_inside() -> bool:
    if calls.running == 0:
        return False
    warnings.warn(_TEXT, EnsembleWarning, stacklevel=caller_level())
    return True
