"""Which ops a call runs, where in the member, how, and what share of the time each takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from unisono.engine import rng
from unisono.engine.attention import native_layers
from unisono.engine.axis import without_modes
from unisono.engine.kernels import Note, noted
from unisono.engine.parts import Call, Result
from unisono.engine.planning.plan import How, OpRecord, Plan, RunName
from unisono.engine.planning.rehearsal import Rehearsal
from unisono.engine.planning.running import run
from unisono.engine.template import Template


class _Seen(NamedTuple):
    path: str
    op: str
    how: How
    rule: str
    seconds: float


def ops_of(plan: Plan, template: Template, call: Call) -> tuple[OpRecord, ...]:
    """The ops of one run, forward only, that leaves nothing behind.

    Of a loop or of chunks, the ops of the first pass are listed, with their share of all.
    """
    rehearsal = Rehearsal(template, call)
    passes = _Passes(template.module, call.fn, rng.devices_of(template.values()), plan.strategy)

    def strategy(template: Template, values: Sequence[Any], call: Call) -> Result:
        with passes:
            return run(plan, template, values, call._replace(fn=passes.call_member))

    with passes.native_layers(template):
        rehearsal.run(strategy, "contiguous")  # what is paid once is no op's share
        passes.seen = []
        rehearsal.run(strategy, "contiguous")
    return _records(passes.seen)


def _records(passes: Sequence[Sequence[_Seen]]) -> tuple[OpRecord, ...]:
    total = sum(op.seconds for ops in passes for op in ops) or 1.0
    first = passes[0] if passes else []
    alike = [ops for ops in passes if len(ops) == len(first)]
    records = []
    for k, op in enumerate(first):
        # Members whose ops differ in number count for those of the first, in proportion.
        own = sum(ops[k].seconds for ops in alike)
        share = own * len(passes) / len(alike) / total
        records.append(OpRecord(op.path, op.op, op.how, op.rule, min(share, 1.0)))
    return tuple(records)


class _Passes(TorchFunctionMode):
    """Records every torch function, one list for each time that a member is called.

    Args:
        module: The template's module tree, to name the places.
        fn: The function of a member.
        devices: Accelerators to wait for before a clock is read.
        name: The strategy that runs.
    """

    def __init__(
        self,
        module: nn.Module,
        fn: Callable[..., Any],
        devices: Iterable[torch.device],
        name: RunName,
    ) -> None:
        super().__init__()
        self.seen: list[list[_Seen]] = []
        self._names: dict[int, str] = {id(m): path for path, m in module.named_modules()}
        self._fn = fn
        self._devices = list(devices)
        self._default: How = "member" if name == "loop" else "torch"
        self._inside = False

    def call_member(self, member: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """The function of a member, its ops in a list of their own."""
        self.seen.append([])
        self._inside = True
        try:
            return self._fn(member, *args, **kwargs)
        finally:
            self._inside = False

    @contextmanager
    def native_layers(self, template: Template) -> Iterator[None]:
        """Take attention layers as one op where torch runs them as one, which no mode sees."""
        native = [] if torch.is_grad_enabled() else native_layers(template.module)
        short = [vars(module).get("forward") for module in native]
        for module in native:
            module.forward = partial(self._run_native, module, module.forward)
        template.look()
        try:
            yield
        finally:
            for module, forward in zip(native, short, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward
            template.look()

    def _run_native(
        self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        with without_modes():
            result, notes, elapsed = self._timed(forward, args, kwargs)
        if self._inside:
            path = self._names[id(module)]
            self.seen[-1] += self._entries(path, type(module).__name__, notes, elapsed)
        return result

    def _timed(
        self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, list[Note], float]:
        with noted() as notes:
            self._wait()
            start = time.perf_counter()
            result = func(*args, **kwargs)
            self._wait()
            return result, notes, time.perf_counter() - start

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        if not self._inside or not name:
            return func(*args, **kwargs)
        path = self._place()
        result, notes, elapsed = self._timed(func, args, kwargs)
        self.seen[-1] += self._entries(path, name, notes, elapsed)
        return result

    def _entries(self, path: str, name: str, notes: list[Note], elapsed: float) -> list[_Seen]:
        """One op; or what a function of several ops is made of, and the rest of it."""
        if len(notes) == 1 and notes[0].op.split(".")[0].strip("_") in name:
            return [_Seen(path, name, notes[0].how, notes[0].rule, elapsed)]
        parts = [_Seen(path, note.op, note.how, note.rule, note.seconds) for note in notes]
        rest = max(0.0, elapsed - sum(note.seconds for note in notes))
        return [*parts, _Seen(path, name, self._default, "", rest)]

    def _place(self) -> str:
        """The path of the innermost of the member's modules that is running."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            owner = id(frame.f_locals.get("self"))
            if owner in self._names:
                return self._names[owner]
            frame = frame.f_back
        return ""

    def _wait(self) -> None:
        for device in self._devices:
            torch.get_device_module(device).synchronize(device)


def _name_of(func: Any) -> str:
    """The function's own name; empty for what computes nothing, such as ``x.shape``."""
    name = str(resolve_name(func) or getattr(func, "__name__", ""))
    if name.endswith(("__get__", "__set__")):
        return ""
    short = name.rsplit(".", 1)[-1]
    return "" if short in _NOT_OPS else short


_NOT_OPS = frozenset({"size", "dim", "stride", "numel", "is_floating_point", "__len__", "shape"})
