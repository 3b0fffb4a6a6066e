"""Derivatives inside ``forward``: ``autograd.grad``, ``requires_grad_`` and what belongs to them.

Autograd works below the member axis, on the stacked tensors, so that is where these are done. The
gradient of the sum over the members is that of each, for no member depends on another's tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from unisono.engine.axis import attach, below, detach

_TENSOR: Any = Tensor

# Functions of one tensor that only look at its place in the graph, or change it. The getters are
# made anew on each access, but compare equal.
ON_STACKED: Final = frozenset(
    {
        _TENSOR.requires_grad_,
        _TENSOR.requires_grad.__get__,
        _TENSOR.requires_grad.__set__,
        _TENSOR.retain_grad,
        _TENSOR.detach_,
        _TENSOR.is_leaf.__get__,
        _TENSOR.data.__get__,
        _TENSOR.grad.__get__,
    }
)


def grad_of_members(
    level: int,
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` for one member, computed for all.

    Raises:
        RuntimeError: If an input is one for all members, or an output isn't a scalar.
    """
    outputs, inputs = _as_list(outputs), _as_list(inputs)
    weights = [None] * len(outputs) if grad_outputs is None else _as_list(grad_outputs)
    placed = [detach(tensor, level) for tensor in inputs]
    if any(dim is None for _, dim in placed):
        raise RuntimeError(
            "torch.autograd.grad: an input is the same tensor for all members, so the gradients of"
            " the members can't be told apart; make it from an input of forward"
        )
    for output, weight in zip(outputs, weights, strict=True):
        if weight is None and output.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    pairs = [
        (detach(output, level), None if weight is None else detach(weight, level))
        for output, weight in zip(outputs, weights, strict=True)
    ]
    with below():
        stacked = [_first(*output) for output, _ in pairs]
        ones = [
            torch.ones_like(value) if weight is None else _first(*weight).expand_as(value)
            for value, (_, weight) in zip(stacked, pairs, strict=True)
        ]
        grads = torch.autograd.grad(stacked, [value for value, _ in placed], ones, **options)
    return tuple(
        None if grad is None else attach(grad, level, dim or 0)
        for grad, (_, dim) in zip(grads, placed, strict=True)
    )


def backward_of_members(
    level: int, output: Tensor, gradient: Tensor | None = None, **options: Any
) -> None:
    """`Tensor.backward` for one member, done for all: gradients add up in the stacked tensors."""
    if gradient is None and output.numel() != 1:
        raise RuntimeError("grad can be implicitly created only for scalar outputs")
    value, dim = detach(output, level)
    weight = None if gradient is None else detach(gradient, level)
    if options.get("inputs") is not None:
        options["inputs"] = [detach(tensor, level)[0] for tensor in _as_list(options["inputs"])]
    with below():
        value = _first(value, dim)
        ones = torch.ones_like(value) if weight is None else _first(*weight).expand_as(value)
        value.backward(ones, **options)  # type: ignore[no-untyped-call]


def _first(value: Tensor, dim: int | None) -> Tensor:
    return value if dim is None else value.movedim(dim, 0)


def _as_list(tensors: Any) -> Sequence[Any]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)
