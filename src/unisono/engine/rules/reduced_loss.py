"""Losses of single elements or examples: all members at once, each reduced by itself."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from unisono.engine.axis import Operand, Rule
from unisono.engine.rules.layout import for_each_member, members_first, unfolded

_NONE, _MEAN = 0, 1  # at::Reduction

REDUCED_LOSSES: Final = {
    "binary_cross_entropy": 3,
    "binary_cross_entropy_with_logits": 4,
    "kl_div": 2,
    "margin_ranking_loss": 3,
    "triplet_margin_loss": 3,
    "soft_margin_loss": 2,
    "multi_margin_loss": 2,  # and the weight of the classes, behind two numbers
    "multilabel_margin_loss": 2,
}
"""For each op the number of leading arguments that broadcast with each other."""

_ONE_BATCH_AXIS: Final = ("multi_margin_loss", "multilabel_margin_loss")


def reduced_loss(op: str) -> Rule:
    """The rule of one loss: over (N, *) without reduction, then reduced to (N).

    Torch takes these apart into up to sixteen passes, or loops over the members.
    """
    loss = getattr(torch.ops.aten, op).default
    num_tensors = REDUCED_LOSSES[op]
    arguments = loss._schema.arguments[num_tensors:]
    defaults = [argument.default_value for argument in arguments if not argument.kwarg_only]
    place = [argument.name for argument in arguments].index("reduction")

    def rule(n: int, *args: Any, **options: Any) -> Operand | None:
        operands = [*args[:num_tensors], *[None] * (num_tensors - len(args))]
        shapes = [_shape(x) for x in operands if x is not None]
        if all(x is None or x[1] is None for x in operands):
            return None
        if op.startswith("binary") and shapes[0] != shapes[1]:
            return None  # torch says what is wrong
        rest = [value[0] if isinstance(value, tuple) else value for value in args[num_tensors:]]
        if any(isinstance(value, tuple) and value[1] is not None for value in args[num_tensors:]):
            return None
        rest += defaults[len(rest) :]
        reduction, rest[place] = rest[place], _NONE
        rank = max(len(shape) for shape in shapes)
        folds = rank == 2 and op in _ONE_BATCH_AXIS
        values: list[Tensor | None]
        if op in _ONE_BATCH_AXIS:
            values = [for_each_member(x, n).flatten(0, int(folds)) for x in operands if x]
        else:
            values = [None if x is None else _aligned(x, n, rank) for x in operands]
        losses = loss(*values, *rest, **options)
        losses = unfolded(losses, 0, n) if folds else losses
        if reduction == _NONE:
            return losses, 0
        losses = losses.reshape(n, -1)
        return losses.mean(1) if reduction == _MEAN else losses.sum(1), 0

    rule.__name__ = op
    return rule


def _shape(x: Operand) -> torch.Size:
    """The shape as one member sees it."""
    return x[0].shape if x[1] is None else members_first(x).shape[1:]


def _aligned(x: Operand, n: int, rank: int) -> Tensor:
    """The operand as (N, 1, ..., *) with ``rank`` axes behind the members, without a copy."""
    shape = _shape(x)
    value = for_each_member(x, n)
    return value[(slice(None), *[None] * (rank - len(shape)))]
