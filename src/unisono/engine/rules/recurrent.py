"""``aten::lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu``: a step at a time, or a member at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from unisono.engine.axis import Operand, Rule, has_tangents, is_observed
from unisono.engine.rules.layout import for_each_member
from unisono.engine.rules.recurrent_steps import (
    Shape,
    Step,
    gru,
    lstm,
    rnn_relu,
    rnn_tanh,
    run_layers,
)


class _Limits(NamedTuple):
    """Where a step of all members is faster than the members one after another.

    Args:
        members: At least so many.
        hidden: Hidden size H up to which it is; of more, the weights leave the cache in each step.
        values: B * H up to which it is.
    """

    members: int
    hidden: int
    values: int


def recurrent(op: str) -> Rule:
    """The rule of a recurrent op over whole sequences.

    Torch has no batching rule for it. Its own op, for one member after another, spends most of the
    time of a small network on starting operations, and little of it on more than one core: there
    each step is taken by all members at once. Large ones run one after another.
    """
    step, limits = _OPS[op]
    name = op.partition(".")[0]
    of_one_member = getattr(torch, name)

    def rule(
        n: int,
        x: Operand,
        state: Operand | Sequence[Operand],
        parameters: Sequence[Operand],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> list[Operand | None] | None:
        states = [state] if isinstance(state, tuple) else state
        if train and dropout > 0 and num_layers > 1:
            return None  # it draws, each member for itself or all the same
        if all(dim is None for _, dim in (x, *states, *parameters)) or not _is_plain(x):
            return None
        shape = Shape(num_layers, 2 if bidirectional else 1, 4 if has_biases else 2)
        is_projected = len(parameters) != math.prod(shape)
        if is_projected or not _pays(n, states[0], x[0], limits):
            options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
            return _one_by_one(of_one_member, n, x, state, parameters, options)
        sequence = for_each_member(x, n)  # (N, B, T, I) if the batch is first, else (N, T, B, I)
        outputs, last = run_layers(
            step,
            sequence.transpose(1, 2) if batch_first else sequence,
            [for_each_member(own, n).unbind(1) for own in states],
            [for_each_member(parameter, n) for parameter in parameters],
            shape,
        )
        return [(outputs.transpose(1, 2) if batch_first else outputs, 0), *((h, 0) for h in last)]

    rule.__name__ = name
    return rule


def _is_plain(x: Operand) -> bool:
    """Whether it is a batch of sequences, and nobody looks at single ops."""
    value, dim = x
    return (
        value.dim() == 3 + (dim is not None)
        and value.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()  # the length of a sequence may not be fixed
        and not is_observed()
        and not has_tangents()
    )


def _pays(n: int, state: Operand, x: Tensor, limits: _Limits) -> bool:
    """Whether a step of all members is faster than the members one after another."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    members = limits.members
    if limits is _LSTM and torch.is_grad_enabled():
        members *= 2
    batch, hidden = state[0].shape[-2:]
    return n >= members and hidden <= limits.hidden and batch * hidden <= limits.values


def _one_by_one(
    run: Callable[..., Sequence[Tensor]],
    n: int,
    x: Operand,
    state: Operand | Sequence[Operand],
    parameters: Sequence[Operand],
    options: tuple[object, ...],
) -> list[Operand | None]:
    """Torch's own op for one member after another."""
    if isinstance(state, tuple):
        states: Sequence[Tensor] | Sequence[tuple[Tensor, ...]] = _column(state, n)
    else:
        states = _columns(state, n)
    columns = zip(_column(x, n), states, _columns(parameters, n), strict=True)
    found = zip(*(run(*own, *options) for own in columns), strict=True)
    return [(_stacked(parts), 0) for parts in found]


def _column(operand: Operand, n: int) -> Sequence[Tensor]:
    """The tensor of each member."""
    value, dim = operand
    return [value] * n if dim is None else value.unbind(dim)


def _columns(operands: Sequence[Operand], n: int) -> list[tuple[Tensor, ...]]:
    """The tensors of each member."""
    return list(zip(*(_column(operand, n) for operand in operands), strict=True))


def _stacked(parts: tuple[Tensor, ...]) -> Tensor:
    """The tensors behind each other, in the order of memory that they have themselves."""
    if parts[0].is_contiguous():
        return torch.stack(parts)
    return torch.stack([part.transpose(0, 1) for part in parts]).transpose(1, 2)


# Measured on 2 AVX-512 cores (`python -m benchmarks.recurrent`). Torch's LSTM is oneDNN's, which is
# better than its other ones; in training it takes twice as many members to be faster.
_LSTM: Final = _Limits(members=8, hidden=128, values=512)
_OPS: Final[Mapping[str, tuple[Step, _Limits]]] = {
    "lstm.input": (lstm, _LSTM),
    "gru.input": (gru, _Limits(members=4, hidden=128, values=4096)),
    "rnn_tanh.input": (rnn_tanh, _Limits(members=4, hidden=256, values=4096)),
    "rnn_relu.input": (rnn_relu, _Limits(members=4, hidden=256, values=4096)),
}
RECURRENT: Final = tuple(_OPS)
