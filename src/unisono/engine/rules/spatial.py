"""Pooling, upsampling, padding and joining, in the layout in which the input comes.

These ops treat batch and channels alike, so members go where they lie: after a convolution among
the channels, else in front of the batch. Torch's own rules move them to the batch, and the next
convolution moves them back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch

from unisono.engine.axis import Operand, Rule
from unisono.engine.rules.avg_pool import avg_pool
from unisono.engine.rules.layout import (
    batch_lies_outside,
    folded,
    for_each_member,
    members_first,
    unfolded,
)
from unisono.engine.rules.max_pool import max_pool
from unisono.engine.rules.windows import along_axes

POOLING: Final = tuple(
    f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)
)
_ADAPTIVE_AVERAGE: Final = {
    d: getattr(torch.ops.aten, f"adaptive_avg_pool{d}d").default for d in (1, 2, 3)
}
UPSAMPLING: Final = tuple(
    f"{kind}.vec"
    for kind in (
        *(f"upsample_nearest{d}d" for d in (1, 2, 3)),
        *(f"_upsample_nearest_exact{d}d" for d in (1, 2, 3)),
        "upsample_linear1d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
        "upsample_trilinear3d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
    )
)


def spatial(op: str) -> Rule:
    """The rule of one op on the last axes, ``y[i] = op(x[i])``; (N, B, C, *) -> (N, B, C, *)."""
    name, _, overload = op.partition(".")
    run = getattr(getattr(torch.ops.aten, name), overload or "default")
    match = re.search(r"(\d)d", name)
    assert match is not None
    dims = int(match[1])  # max_pool2d

    pools: dict[str, Callable[..., torch.Tensor]] = {
        f"max_pool{dims}d": partial(max_pool, dims),
        f"avg_pool{dims}d": partial(avg_pool, dims),
        f"adaptive_avg_pool{dims}d": partial(_adaptive_average, dims),
    }
    run = pools.get(name, run)

    def rule(n: int, x: Operand, *options: Any) -> Operand | list[Operand | None] | None:
        return _fold(run, n, x, dims, options)

    rule.__name__ = name
    return rule


def pad(
    n: int, x: Operand, padding: Sequence[int], mode: str = "constant", value: float | None = None
) -> Operand | list[Operand | None] | None:
    """Widen the last axes; constants need no folding, the members stay where they are."""
    tensor, dim = x
    run = torch.ops.aten.pad.default
    dims = len(padding) // 2
    if mode == "constant":
        if dim is not None and dim + dims >= tensor.dim():
            tensor, dim = members_first(x), 0
        return run(tensor, padding, mode, value), dim
    return _fold(run, n, x, dims, (padding, mode, value))


def cat(n: int, tensors: Sequence[Operand], dim: int = 0) -> Operand | None:
    """Join tensors along an axis where in memory the batch lies outermost."""
    stacked = [x for x in tensors if x[1] is not None]
    ranks = {value.dim() - (axis is not None) for value, axis in tensors}
    if torch.compiler.is_exporting() and len(ranks) == 1 and min(ranks) > 0:
        # Torch's own rule would fix the size of a batch.
        return torch.cat([for_each_member(x, n) for x in tensors], dim + (dim >= 0)), 0
    if not stacked or len(ranks) > 1 or not all(batch_lies_outside(x) for x in stacked):
        return None
    rank = ranks.pop()
    if rank < 2:
        return None
    values = [
        value.unsqueeze(1).expand(-1, n, *value.shape[1:])
        if axis is None
        else members_first((value, axis)).movedim(0, 1)
        for value, axis in tensors
    ]  # (B, N, *)
    dim = dim % rank
    return torch.cat(values, dim + (dim > 0)), 1


def _adaptive_average(dims: int, x: torch.Tensor, size: int | Sequence[int]) -> torch.Tensor:
    """What ``adaptive_avg_poolNd`` does: a mean, or an average pool, where it is one."""
    size = along_axes(size, dims)
    if _is_mean(x, size):
        return _mean(x, size)
    # With sizes that aren't fixed, as in an export, nothing may depend on what divides them.
    if type(x) is torch.Tensor and x.device.type == "cpu" and x.dim() > len(size) == dims:
        positions = x.shape[x.dim() - dims :]
        columns = list(zip(positions, size, strict=True))
        if max(size) > 1 and all(0 < k <= s and s % k == 0 for s, k in columns):
            return avg_pool(dims, x, [s // k for s, k in columns])
    pooled: torch.Tensor = _ADAPTIVE_AVERAGE[dims](x, size)
    return pooled


def _is_mean(x: torch.Tensor, size: Sequence[int]) -> bool:
    """Whether pooling to this size is a mean over all positions, better taken by `_mean`.

    The sum of many halves may be out of their range.
    """
    is_wide = x.dtype in (torch.float32, torch.float64)
    return torch.is_grad_enabled() and is_wide and all(each == 1 for each in size)


def _mean(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """What the pool does, with a gradient in no order of its own.

    Torch divides the gradient of a mean after it has expanded it to all positions. That makes it a
    dense tensor, in which the channels lie outside; what is in channels-last before the pool then
    has to read it element by element.
    """
    positions = x.shape[x.dim() - len(size) :]
    total = x.sum(tuple(range(-len(size), 0)), keepdim=True)
    return total / math.prod(positions)


def _fold(
    run: Any, n: int, x: Operand, dims: int, options: tuple[Any, ...]
) -> Operand | list[Operand | None] | None:
    """Run with the members folded into batch or channels; without either, with N as the batch."""
    value, dim = x
    if dim is not None and value.dim() - 1 <= dims:
        return None  # without channels; the members would be taken for them
    folds = dim is not None and value.dim() - 1 == dims + 2
    where = 1 if folds and batch_lies_outside(x) else 0
    y = run(folded(x, where, n) if folds else members_first(x), *options)

    def own(part: torch.Tensor) -> Operand:
        if dim is None:
            return part, None
        return (unfolded(part, where, n), where) if folds else (part, 0)

    return own(y) if isinstance(y, torch.Tensor) else [own(part) for part in y]
