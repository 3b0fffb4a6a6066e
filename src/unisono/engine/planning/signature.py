"""What calls have in common that run the same way."""

from __future__ import annotations

import functools
import hashlib
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from unisono.engine.inputs import PerMember
from unisono.engine.parts import Call
from unisono.engine.template import Template
from unisono.engine.tree import leaves

Signature = tuple[Any, ...]
"""Hashable; equal for calls that run the same way."""


def quick_key(call: Call, is_training: bool, home: Tensor, chunk_size: int | None) -> Any:
    """What tells the signature of a call on one tensor at a tenth of the price; else None."""
    if call.kwargs or len(call.args) != 1:
        return None
    arg = call.args[0]
    tensor = arg.tree if type(arg) is PerMember else arg
    if type(tensor) is not Tensor or not tensor.is_contiguous():
        return None
    device = home.device
    kind = device.type
    return (
        kind_of(call.fn),
        call.randomness,
        is_training,
        torch.is_grad_enabled(),
        _autocast_dtype(kind),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        tensor is arg,
        tensor.shape,
        tensor.dtype,
        tensor.device,
        tensor.requires_grad,
        device,
        home.dtype,
        chunk_size,
    )


def signature_of(call: Call, is_training: bool, home: Tensor) -> Signature:
    """The signature of a call on an ensemble whose tensors are where, and what, ``home`` is.

    Sizes count by powers of two: a last, smaller minibatch runs as the others did. Texts and
    truth values are part of the signature (``return_all=True`` is another computation), numbers
    only by their type (a step counter isn't).
    """
    kind = home.device.type
    grad = torch.is_grad_enabled()
    return (
        kind_of(call.fn),
        call.n,
        call.randomness,
        is_training,
        grad,
        _autocast_dtype(kind),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_inference_mode_enabled(),
        kind,
        home.dtype,
        tuple([_describe(arg, grad) for arg in call.args]),
        tuple([(name, _describe(call.kwargs[name], grad)) for name in sorted(call.kwargs)])
        if call.kwargs
        else (),
    )


def as_text(signature: Signature) -> str:
    """The signature as a text that is the same in another process."""
    return "|".join(_text(part) for part in signature)


def fingerprint(member: nn.Module, template: Template) -> str:
    """A text for what the ensemble is made of: classes, names, shapes, what is shared."""
    lines = [
        f"{path}:{type(module).__module__}.{type(module).__qualname__}:{module.extra_repr()}"
        for path, module in member.named_modules()
    ]
    lines += [
        f"{slot.name}:{slot.kind}:{slot.stacked}:{tuple(value.shape)}:{value.requires_grad}"
        for slot, value in zip(template.slots, template.values(), strict=True)
        if isinstance(value, Tensor)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


_has_autocast = functools.cache(torch.amp.is_autocast_available)


def _autocast_dtype(kind: str) -> torch.dtype | None:
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _describe(arg: Any, grad: bool) -> Any:
    if isinstance(arg, Tensor):
        return _of_tensor(arg, grad)
    if isinstance(arg, PerMember):
        return "per_member", _describe(arg.tree, grad)
    if arg is None or isinstance(arg, bool | str):
        return arg
    if isinstance(arg, int | float | complex):
        return type(arg)
    items = list(leaves(arg))
    if len(items) == 1 and items[0][1] is arg:
        return type(arg)
    return tuple([(path, _describe(leaf, grad)) for path, leaf in items])


def _of_tensor(tensor: Tensor, grad: bool) -> Any:
    if tensor.layout is not torch.strided:
        layout: Any = tensor.layout
    else:
        layout = tensor.is_contiguous()
    return (
        tuple([(size - 1).bit_length() if size else -1 for size in tensor.shape]),
        tensor.dtype,
        tensor.device.type,
        layout,
        grad and tensor.requires_grad,
    )


def kind_of(fn: Any) -> Any:
    """What stays the same where a caller makes the same function anew for each call."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__code__", type(fn))


def _text(part: Any) -> str:
    if isinstance(part, CodeType):
        digest = hashlib.sha256(part.co_code + repr(part.co_names).encode()).hexdigest()[:12]
        return f"{part.co_qualname}#{digest}"
    if isinstance(part, type):
        return f"{part.__module__}.{part.__qualname__}"
    if isinstance(part, tuple):
        return "(" + ",".join(map(_text, part)) + ")"
    return str(part)
