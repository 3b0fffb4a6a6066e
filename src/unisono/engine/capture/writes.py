"""What ``forward`` assigned, as ops of the program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unisono.engine.capture.recording import Recorder
from unisono.engine.parts import Assigned, Result
from unisono.engine.template import Template
from unisono.errors import UnsupportedModelError


def write_back(
    recorder: Recorder, template: Template, values: Sequence[Any], result: Result
) -> list[str]:
    """Record that assigned buffers are stored; returns the names of other assigned attributes."""
    buffers = {
        slot.name: (slot, value)
        for slot, value in zip(template.slots, values, strict=True)
        if slot.kind == "buffer"
    }
    frozen: list[str] = []
    writes: list[tuple[Any, Any]] = []
    for item in result.assigned:
        if item.kind != "buffer":
            frozen.append(item.name)
            continue
        slot, buffer = buffers.get(item.name, (None, None))
        value = item.value
        if slot is not None and not slot.stacked and item.stacked:
            value = value[0]  # kept once for all members
        if not _fits(value, buffer, repeated=not item.stacked):
            raise _no_buffer(item, buffer)
        is_fresh = recorder.trace.origin(recorder.refer(value)) == "op"
        writes.append((buffer, value if is_fresh else value.clone()))
    for buffer, value in writes:  # after all clones: two buffers may have been exchanged
        buffer.copy_(value)
    return frozen


def _fits(value: Any, buffer: Any, *, repeated: bool) -> bool:
    if not isinstance(value, Tensor) or not isinstance(buffer, Tensor):
        return False
    shapes = (buffer.shape, buffer.shape[1:]) if repeated else (buffer.shape,)
    return value.shape in shapes and value.dtype == buffer.dtype and value.device == buffer.device


def _no_buffer(item: Assigned, buffer: Any) -> UnsupportedModelError:
    def words(x: Any) -> str:
        return f"shape {tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else repr(x)

    return UnsupportedModelError(
        f"ens.capture(...): forward assigns the buffer `{item.name}` ({words(item.value)}, where"
        f" {words(buffer)} was); a replay writes into the buffer that is there, so it has to keep"
        f" its shape and dtype. If only the first call does this, call the ensemble once before"
    )
