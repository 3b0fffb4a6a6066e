"""Calls that come often, of members in which there is nothing but torch's own layers.

What those do in Python is known, so a replay leaves nothing out: of a hundred calls the tensor ops
of the last are recorded, and calls like it run from then on without the way through the layers.
For small networks that way costs more than their arithmetic.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from unisono.engine.axis import has_global_hooks
from unisono.engine.capture.arguments import Form, outline
from unisono.engine.capture.guards import Guard, Guards
from unisono.engine.capture.record import Request, record
from unisono.engine.inputs import PerMember
from unisono.engine.kernels import is_outside
from unisono.engine.parts import Call, call_member
from unisono.engine.template import Template

OFTEN: Final = 100  # calls; to record one takes about as long as so many
_MOST: Final = 8  # programs
_LONGEST: Final = 5e-3  # seconds; of longer calls the way through the layers is no part


class _Program(NamedTuple):
    form: Form
    weights: Guard  # whether the ensemble's tensors are where they were
    fits: Guard  # that, and whether it is such a call as was recorded
    replay: Callable[..., Any]


class Often:
    """Counts the calls of one ensemble, and replays what came often."""

    def __init__(self) -> None:
        self._programs: tuple[_Program, ...] = ()
        self._count = itertools.count(1)
        self._recording = threading.Lock()

    def forget(self) -> None:
        """Drop all programs: the tensors are about to move."""
        self._programs = ()

    def replayed(self, call: Call) -> tuple[Any] | None:
        """The outputs of a call that is known, None for any other."""
        if not self._programs or torch.is_grad_enabled() or not _is_plain(call):
            return None
        form, tensors = outline(call.args, call.kwargs)
        for program in self._programs:
            if program.form is form and program.fits(*tensors):
                return (program.replay(*tensors),)
        if not all(program.weights() for program in self._programs):
            self.forget()  # they keep the memory that the ensemble's tensors had
        return None

    def is_due(self, template: Template, call: Call) -> bool:
        """Whether this call, which runs all members at once, is to be recorded."""
        if template.chain is None or template.is_training or torch.is_grad_enabled():
            return False
        times, rest = divmod(next(self._count), OFTEN)
        # 1, 2, 4, 8, ... times: so recording stays a small part, whatever comes of it.
        return rest == 0 and times & (times - 1) == 0 and _is_plain(call)

    def record(self, template: Template, call: Call, outputs: Any, seconds: float) -> None:
        """Record a call that is due.

        The program is kept if it gives, to the bit, what the call gave.

        Args:
            template: The one that ran the call.
            call: The call.
            outputs: What came of it.
            seconds: What it took.
        """
        if seconds > _LONGEST or not self._recording.acquire(blocking=False):
            return
        try:
            kept = tuple(program for program in self._programs if program.weights())
            form, tensors = outline(call.args, call.kwargs)
            is_known = any(p.form is form and p.fits(*tensors) for p in kept)  # by another thread
            program = _recorded(template, call) if not is_known and len(kept) < _MOST else None
            if program is not None:
                if torch.equal(program.replay(*tensors), outputs):
                    kept = (program, *kept)
            self._programs = kept
        finally:
            self._recording.release()


def _is_plain(call: Call) -> bool:
    """Whether it is ``ens(x)`` for one tensor, and nobody looks on."""
    if call.fn is not call_member or call.kwargs or len(call.args) != 1:
        return False
    arg = call.args[0]
    tensor = arg.tree if type(arg) is PerMember else arg
    return type(tensor) is Tensor and is_outside() and not has_global_hooks()


def _recorded(template: Template, call: Call) -> _Program | None:
    form, _ = outline(call.args, call.kwargs)
    request = Request(call.fn, call.n, "fused", call.randomness, None)
    try:
        with torch.inference_mode(False), torch.no_grad():
            recording, sample = record("fused", template, request, call.args, call.kwargs)
            replay = recording.bind()
    except Exception:  # the call itself has just succeeded, and can go on without
        return None
    if replay is None or recording.frozen:
        return None
    modes = [members for _, members in template.modes]
    devices = sorted({x.device.type for x in sample.inputs})
    guards = Guards(
        sample.inputs, modes, [d for d in devices if torch.amp.is_autocast_available(d)]
    )
    return _Program(form, *guards.bind(recording.sources), replay)
