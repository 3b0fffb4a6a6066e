"""The physical order in which parameters are stored, where another than torch's is faster.

Shapes, names and values don't show it. Convolutions may keep their weights in channels-last
order, (N, O, *, C) in memory; linear layers theirs transposed, (N, I, O) in memory: the matrix
product reads it in order, and the gradient arrives in it, without a copy
(https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unisono.engine.planning.plan import MemoryFormat
from unisono.engine.template import Slot, Template
from unisono.engine.tree import leaves

_CONVOLUTIONS = (
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def formats_of(template: Template) -> tuple[MemoryFormat, ...]:
    """The formats that may pay for this member, ``"contiguous"`` first."""
    kinds = [type(module) for module in template.module.modules()]
    if any(issubclass(kind, _CONVOLUTIONS) for kind in kinds):
        return ("contiguous", "channels_last")
    if any(issubclass(kind, nn.Linear) for kind in kinds):
        return ("contiguous", "transposed")
    return ("contiguous",)


def in_format(template: Template, values: Sequence[Any], memory_format: MemoryFormat) -> list[Any]:
    """The values with copies, in this format, of those parameters that it concerns."""
    strides = {
        slot.name: _strides(slot, memory_format) for slot in _concerned(template, memory_format)
    }
    copies: dict[int, Tensor] = {}  # a tied parameter has several slots
    for slot, value in zip(template.slots, values, strict=True):
        order = strides.get(slot.name)
        if order is not None and value.stride() != order and id(value) not in copies:
            copies[id(value)] = _converted(value, order)
    return [copies.get(id(value), value) for value in values]


def adopt(template: Template, memory_format: MemoryFormat) -> None:
    """Store the ensemble's parameters in this format from now on; they stay the same objects.

    So does the state of an optimizer that nobody else knows.
    """
    moved = _moved(template, memory_format)
    states = [] if template.only_state is None else _states_of(template, moved)
    # Not in inference mode, whose tensors could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        for slot, state in [(slot, [_value(slot)]) for slot in moved] + states:
            strides, shape = _strides(slot, memory_format), _value(slot).shape
            for tensor in state:
                if tensor.shape == shape and tensor.stride() != strides:  # tied ones come twice
                    tensor.data = _converted(tensor, strides)


def is_free(template: Template, memory_format: MemoryFormat) -> bool:
    """Whether the parameters may be stored in this format.

    Not once training has left something in their present order: fused optimizers read a
    parameter, its gradient and its moments by address, and would mix up their elements without
    a word if the orders differed. State that nobody else knows moves along.
    """
    moved = _moved(template, memory_format)
    if any(not _value(slot).is_leaf or _value(slot).grad is not None for slot in moved):
        return False
    if template.only_state is not None:
        return True
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False  # DistributedDataParallel has noted the order, and mixes up the gradients
    return not _states_of(template, moved)


def demanded_format(template: Template) -> MemoryFormat:
    """The format that the state of an optimizer has: it may have been loaded from a file."""
    for memory_format in formats_of(template)[1:]:
        for slot, state in _states_of(template, _concerned(template, memory_format)):
            order, shape = _strides(slot, memory_format), _value(slot).shape
            moments = [m for m in state if m.shape == shape and not m.is_contiguous()]
            if any(moment.stride() == order for moment in moments):
                return memory_format
    return "contiguous"


def current_format(template: Template) -> MemoryFormat:
    """The format in which the parameters are stored now."""
    for memory_format in formats_of(template)[1:]:
        slots = _concerned(template, memory_format)
        if slots and all(_value(slot).stride() == _strides(slot, memory_format) for slot in slots):
            return memory_format
    return "contiguous"


def _moved(template: Template, memory_format: MemoryFormat) -> list[Slot]:
    """The slots of parameters that are stored in another order now."""
    slots = _concerned(template, memory_format)
    return [slot for slot in slots if _value(slot).stride() != _strides(slot, memory_format)]


def _concerned(template: Template, memory_format: MemoryFormat) -> list[Slot]:
    """The slots of parameters that the format stores in another order."""
    if memory_format == "contiguous":
        return []
    kinds = _CONVOLUTIONS if memory_format == "channels_last" else (nn.Linear,)
    owners = {
        f"{path}.weight" if path else "weight"
        for path, module in template.module.named_modules()
        if isinstance(module, kinds)
    }
    return [
        slot
        for slot in template.slots
        if slot.kind == "parameter" and slot.name in owners and _is_strided(slot)
    ]


def _is_strided(slot: Slot) -> bool:
    value = _value(slot)
    return isinstance(value, Tensor) and value.layout is torch.strided


def _strides(slot: Slot, memory_format: MemoryFormat) -> tuple[int, ...]:
    """The strides of the slot's shape in the format.

    Written out, because torch takes any order of an axis of length 1 for contiguous, while its
    convolutions look at the strides to see which order is meant.
    """
    shape = _value(slot).shape
    order = list(range(len(shape)))
    second = order.pop(1 + slot.stacked)  # (N, O, I) -> N, I, O;  (N, O, C, *) -> N, O, *, C
    order.insert(slot.stacked if memory_format == "transposed" else len(order), second)
    strides = [0] * len(shape)
    step = 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


def _converted(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    with torch.no_grad():
        copy = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
        copy.copy_(value)
    return copy.requires_grad_(value.requires_grad)


def _states_of(template: Template, slots: Sequence[Slot]) -> list[tuple[Slot, list[Tensor]]]:
    """The tensors that mappings hold under parameters as keys, as an optimizer's state does."""
    if template.only_state is not None:
        known = [(slot, template.only_state.get(_value(slot))) for slot in slots]
        return [(slot, _tensors(state)) for slot, state in known]
    # To look through all objects takes a tenth of a second. There is no need if a parameter is
    # known to its tree alone, and to this very expression.
    held = [s for s in slots if sys.getrefcount(s.source[s.source_key]) > _KNOWN_REFERENCES]
    by_id = {id(_value(slot)): slot for slot in held}
    if not by_id:
        return []
    holders = gc.get_referrers(*map(_value, held))
    return [
        (by_id[id(key)], _tensors(value))
        for holder in holders
        if isinstance(holder, dict)
        for key, value in list(holder.items())
        if id(key) in by_id
    ]


_KNOWN_REFERENCES = 2


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]


def _value(slot: Slot) -> Any:
    return slot.source[slot.source_key]
