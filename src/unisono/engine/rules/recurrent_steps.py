"""The layers of an LSTM, a GRU and a plain RNN, each step of all members in a few ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

State = tuple[Tensor, ...]
"""(N, B, H) each: what a layer hands from step to step, its output first."""


class Shape(NamedTuple):
    """How many layers there are, directions in a layer, and parameters in a direction."""

    layers: int
    directions: int
    parameters: int


class _Weights(NamedTuple):
    """Of one layer in one direction.

    Args:
        of_input: (N, G * H, I), G being the number of gates.
        of_hidden: (N, G * H, H)
        bias_of_input: (N, G * H)
        bias_of_hidden: (N, G * H)
    """

    of_input: Tensor
    of_hidden: Tensor
    bias_of_input: Tensor | None
    bias_of_hidden: Tensor | None


Step = Callable[[Tensor, State, Tensor, Tensor | None], State]
"""``step(given, state, weight, bias)``: the next state.

``given`` (N, B, G * H) is what the input contributes; ``weight`` (N, H, G * H) and ``bias``
(N, 1, G * H) are those of the hidden values.
"""


def run_layers(
    step: Step,
    sequence: Tensor,
    states: Sequence[Sequence[Tensor]],
    parameters: Sequence[Tensor],
    shape: Shape,
) -> tuple[Tensor, list[Tensor]]:
    """All layers: (N, T, B, I) -> (N, T, B, D * H), and the last states (N, L * D, B, H)."""
    ends: list[State] = []
    for layer in range(shape.layers):
        outputs = []
        for direction in range(shape.directions):
            k = layer * shape.directions + direction
            own = parameters[k * shape.parameters : (k + 1) * shape.parameters]
            weights = _Weights(*own, *[None] * (4 - shape.parameters))
            start = tuple(state[k] for state in states)
            found, end = _run(step, sequence, start, weights, is_backward=direction == 1)
            outputs.append(found)
            ends.append(end)
        sequence = torch.cat(outputs, -1) if shape.directions > 1 else outputs[0]
    return sequence, [torch.stack(part, 1) for part in zip(*ends, strict=True)]


def _run(
    step: Step, sequence: Tensor, state: State, weights: _Weights, *, is_backward: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: (N, T, B, I) -> (N, T, B, H), and the state at its end."""
    n, steps, batch, _ = sequence.shape
    bias, bias_of_hidden = weights.bias_of_input, weights.bias_of_hidden
    if bias is not None and bias_of_hidden is not None and step is not gru:
        bias, bias_of_hidden = bias + bias_of_hidden, None
    rows, of_input = sequence.reshape(n, steps * batch, -1), weights.of_input.mT
    if bias is None:
        given = torch.bmm(rows, of_input)
    else:
        given = torch.baddbmm(bias.unsqueeze(1), rows, of_input)
    weight = weights.of_hidden.mT.contiguous()  # each step reads it
    own_bias = None if bias_of_hidden is None else bias_of_hidden.unsqueeze(1)
    outputs = []
    columns = given.view(n, steps, batch, -1).unbind(1)
    for column in reversed(columns) if is_backward else columns:
        state = step(column, state, weight, own_bias)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if is_backward else outputs, 1), state


def lstm(given: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """The gates i, f, g, o of `nn.LSTM`."""
    h, c = state
    gates = torch.bmm(h, weight).add_(given)
    i, f, g, o = gates.chunk(4, -1)
    if torch.is_grad_enabled():
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    else:
        g = g.tanh()
        gates.sigmoid_()  # and with it what i, f and o see
    c = torch.addcmul(f * c, i, g)
    return o * c.tanh(), c


def gru(given: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """The gates r, z and the new values n of `nn.GRU`."""
    (h,) = state
    own = torch.bmm(h, weight) if bias is None else torch.baddbmm(bias, h, weight)
    sizes = [2 * h.shape[-1], h.shape[-1]]
    given_gates, given_new = torch.split(given, sizes, -1)
    own_gates, own_new = torch.split(own, sizes, -1)
    r, z = (given_gates + own_gates).sigmoid_().chunk(2, -1)
    return (torch.addcmul(given_new, r, own_new).tanh_().lerp(h, z),)


def rnn_tanh(given: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """``tanh(given + h @ weight)``."""
    return (torch.bmm(state[0], weight).add_(given).tanh_(),)


def rnn_relu(given: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """``relu(given + h @ weight)``."""
    return (torch.bmm(state[0], weight).add_(given).relu_(),)
