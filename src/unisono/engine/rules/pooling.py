"""Average and maximum pooling, in the layout in which the input comes."""

from __future__ import annotations

from typing import Any, Final, Protocol

import torch

from unisono.engine.axis import Operand, Rule
from unisono.engine.rules.layout import folded, members_first, unfolded

POOLING: Final = tuple(
    f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg") for d in (1, 2, 3)
)


class _Pool(Protocol):
    def __call__(self, x: torch.Tensor, *options: Any) -> torch.Tensor: ...


def pooling(op: str) -> Rule:
    """The rule of one pooling op, ``y[i] = pool(x[i])``; (N, B, C, *) -> (N, B, C, *).

    Pooling treats batch and channels alike, so members go where they lie: after a convolution
    among the channels, else in front of the batch. Torch's own rule moves them to the batch,
    and the next convolution moves them back.
    """
    pool: _Pool = getattr(torch.ops.aten, op)
    spatial = int(op[-2])  # max_pool2d

    def rule(n: int, x: Operand, *options: Any) -> Operand | None:
        value, dim = x
        if dim is None:
            return pool(value, *options), None
        has_batch = value.dim() - 1 == spatial + 2
        if not has_batch:
            return pool(members_first(x), *options), 0  # (N, C, *)
        where = 1 if dim == 1 else 0
        return unfolded(pool(folded(x, where, n), *options), where, n), where

    return rule
