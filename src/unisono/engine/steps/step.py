"""What a layer does on plain tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from unisono.engine.axis import Operand

Look = Callable[[Tensor], Operand]
"""What a tensor of the layer is for all members."""

Run = Callable[[int, Operand, Look], Operand | None]
"""``run(n, x, look)``: what the layer makes of ``x``; None where the layer itself has to run."""


class Activation(NamedTuple):
    """What a layer does to each element."""

    in_place: Callable[[Tensor], Tensor]
    out_of_place: Callable[[Tensor], Tensor]
    keeps_result: bool  # whether its derivative is a function of the result, not of the input
    overwrites: bool  # whether the user asked for ``inplace=True``


class Step(NamedTuple):
    """One layer.

    Attributes:
        module: The layer.
        run: What it does, None if it is an activation.
        activation: What it does to each element, None otherwise.
        is_view: Whether its result may lie in the memory of its input.
        is_product: Whether its result is a product of matrices, which backward doesn't need.
        with_next: What it and the next layer do together.
        overwriting: What it does without gradients to an input that has no other reader.
    """

    module: nn.Module
    run: Run | None
    activation: Activation | None = None
    is_view: bool = False
    is_product: bool = False
    with_next: Run | None = None
    overwriting: Run | None = None


def parameter_of(own: Mapping[str, Tensor | None], name: str, look: Look) -> Operand | None:
    """One of the layer's tensors."""
    value = own[name]
    return None if value is None else look(value)
