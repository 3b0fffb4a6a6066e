"""`Capture`: a call that was recorded, and is replayed without driver, wrapping or ``forward``."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from unisono.engine.capture.arguments import Form, facts, outline
from unisono.engine.capture.choice import record_fastest
from unisono.engine.capture.graph import GraphReplay
from unisono.engine.capture.guards import Guard, Guards, autocast_dtype
from unisono.engine.capture.record import Recording, Request
from unisono.engine.inputs import PerMember, check_inputs
from unisono.engine.parts import Call
from unisono.engine.pool import Pool
from unisono.engine.where import caller_level
from unisono.errors import EnsembleError, EnsembleWarning


@dataclass(frozen=True)
class _Program:
    """One recording, bound to the ensemble's tensors."""

    recording: Recording
    form: Form
    facts: Mapping[str, str]  # what was recorded, in words
    guards: Guards
    replay: Callable[..., Any]
    weights: Guard
    fits: Guard


class Capture:
    """A recorded call of an ensemble: ``capture(x) == ens(x)``, without Python overhead.

    Made by ``ens.capture(...)``. A call with the same shapes, dtypes and devices, and otherwise
    equal arguments, runs the recorded ops and nothing else. No gradients.

    Attributes:
        on_change: What happens at a call that is unlike the recorded ones: ``"record"`` records
            it as a further program, ``"raise"`` raises an error that says what differs.
        max_programs: How many programs are kept; a call that needs one more is an error.
    """

    def __init__(self, pool: Pool, call: Call, strategy: str, chunk_size: int | str | None) -> None:
        self.on_change: Literal["record", "raise"] = "record"
        self.max_programs = 8
        self._pool = pool
        self._request = Request(call.fn, call.n, strategy, call.randomness, chunk_size)
        self._lock = threading.RLock()
        self._programs: list[_Program] = []
        form, tensors = outline(call.args, call.kwargs)
        self._last = self._find(form, tensors, call.args, call.kwargs)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Replay the call.

        Args:
            *args: As for the ensemble.
            **kwargs: Likewise.

        Returns:
            What the ensemble returns, in fresh memory.

        Raises:
            EnsembleError: If the call is unlike the recorded ones, and ``on_change`` is
                ``"raise"`` or ``max_programs`` are there already; or if an input requires a
                gradient.
        """
        form, tensors = outline(args, kwargs)
        program = self._last
        if form != program.form or not program.fits(*tensors):
            program = self._find(form, tensors, args, kwargs)
        return program.replay(*tensors)

    @property
    def code(self) -> str:
        """The program of the last call as Python text: one line per op."""
        return self._last.recording.text.code

    @property
    def strategy(self) -> str:
        """The strategy that was recorded for the last call: ``"fused"``, ``"vmap"``, ``"loop"``."""
        return self._last.recording.strategy

    def __len__(self) -> int:
        """The number of programs."""
        return len(self._programs)

    def __repr__(self) -> str:
        """The number of programs and the text of the last."""
        return (
            f"Capture({len(self)} of {self.max_programs} programs,"
            f" on_change={self.on_change!r}, strategy={self.strategy!r})\n{self.code}"
        )

    def __reduce__(self) -> Any:
        """Refuse: a capture is tied to the memory of its ensemble."""
        raise TypeError(
            "a capture can't be pickled or copied: it is tied to the memory of its ensemble;"
            " pickle the ensemble, and call ens.capture(...) again"
        )

    def _find(
        self,
        form: Form,
        tensors: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> _Program:
        """The program for this call, recorded if there is none."""
        check_inputs("ens.capture(...)", self._request.n, args, kwargs)
        self._check_gradients(form, tensors)
        with self._lock, torch.inference_mode(False):
            self._programs = [p for p in map(self._renewed, self._programs) if p is not None]
            for program in self._programs:
                if form == program.form and program.guards.inputs(*tensors):
                    self._last = program
                    return program
            self._check_room(form, tensors)
            program = self._record(form, tensors, args, kwargs)
            self._programs.append(program)
            self._last = program
        frozen = program.recording.frozen
        if frozen:
            warnings.warn(_frozen_text(frozen), EnsembleWarning, stacklevel=caller_level())
        return program

    def _record(
        self,
        form: Form,
        tensors: Sequence[Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> _Program:
        template = self._pool.take()
        try:
            with torch.no_grad():
                recording, sample = record_fastest(template, self._request, args, kwargs)
        finally:
            self._pool.give_back(template)
        modes = [vars(module) for module in self._pool.members.modules()]
        guards = Guards(sample.inputs, modes, self._devices(tensors))
        replay = recording.bind()
        assert replay is not None, "the weights changed while the call was recorded"
        if any(x.device.type == "cuda" for x in sample.inputs):
            replay = GraphReplay(replay, sample.inputs, sample.put_back)
        weights, fits = guards.bind(recording.sources)
        words = self._words(form, tensors)
        return _Program(recording, form, words, guards, replay, weights, fits)

    def _renewed(self, program: _Program) -> _Program | None:
        """The program on the tensors that the ensemble has now; None if they don't fit."""
        if program.weights():
            return program
        replay = program.recording.bind()
        if replay is None or isinstance(program.replay, GraphReplay):
            return None
        weights, fits = program.guards.bind(program.recording.sources)
        return replace(program, replay=replay, weights=weights, fits=fits)

    def _check_gradients(self, form: Form, tensors: Sequence[Tensor]) -> None:
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            paths = [path for path, kind, *_ in form if kind in (Tensor, PerMember)]
            found = [p for p, x in zip(paths, tensors, strict=True) if x.requires_grad]
            raise EnsembleError(
                f"ens.capture(...): {', '.join(found)} requires a gradient, and a capture has"
                f" none; call it under `torch.no_grad()`, or the ensemble itself: ens(...)"
            )

    def _check_room(self, form: Form, tensors: Sequence[Tensor]) -> None:
        """Refuse a call that is to be recorded and may not."""
        if not self._programs or (
            self.on_change == "record" and len(self._programs) < self.max_programs
        ):
            return
        words = self._words(form, tensors)
        differences = min(
            (_differences(words, program.facts) for program in self._programs), key=len
        )
        if self.on_change == "raise":
            reason = 'on_change is "raise"'
            remedy = 'set capture.on_change = "record"'
        else:
            reason = f"there are {len(self._programs)} programs already"
            remedy = "raise capture.max_programs"
        raise EnsembleError(
            f"ens.capture(...): this call is unlike the recorded ones, and {reason}:\n\n"
            + "\n".join(f"  {line}" for line in differences)
            + f"\n\nPad the inputs to the recorded shapes, or {remedy}."
        )

    def _devices(self, tensors: Sequence[Tensor]) -> list[str]:
        found = {x.device.type for x in (*tensors, *self._pool.members.parameters())}
        return sorted(filter(torch.amp.is_autocast_available, found)) or ["cpu"]

    def _words(self, form: Form, tensors: Sequence[Tensor]) -> dict[str, str]:
        modes = {path: m.training for path, m in self._pool.members.named_modules()}
        training = [path or "the ensemble" for path, on in modes.items() if on]
        words = "train" if all(modes.values()) else "eval"
        if 0 < len(training) < len(modes):
            words = f"train in {', '.join(training)}"
        casts = {
            f"autocast on {device}": str(autocast_dtype(device) or "off")
            for device in self._devices(tensors)
        }
        return {**facts(form, tensors), "mode": words, **casts}


def _differences(found: Mapping[str, str], recorded: Mapping[str, str]) -> list[str]:
    nothing = "nothing"
    return [
        f"{path}: {found.get(path, nothing)}; recorded with {recorded.get(path, nothing)}"
        for path in {**recorded, **found}
        if found.get(path) != recorded.get(path)
    ]


def _frozen_text(names: Sequence[str]) -> str:
    listed = ", ".join(f"`{name}`" for name in names)
    return (
        f"ens.capture(...): forward assigns {listed}, and a replay doesn't: it runs with the"
        f" values that were there at the recording. Make a tensor that has to change a buffer"
    )
