"""Max pooling, faster than torch where the channels of images lie apart.

Maxima of whole tensors don't tell which of equal values was the first, to which the gradient goes.
With gradients torch's kernel for channels-last runs, another one and a fast one, and backward is
torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from unisono.engine.axis import is_observed
from unisono.engine.rules.windows import (
    along_axes,
    count_operations,
    count_steps,
    reduced,
    windows_of,
)

_aten: Final = torch.ops.aten
_POOLS: Final = {d: getattr(_aten, f"max_pool{d}d").default for d in (1, 2, 3)}
# With so few comparisons for each operation of ours, or altogether, torch is as fast; measured on 2
# AVX-512 cores.
_FEW: Final = 1 << 13
_FEW_WITH_GRADIENTS: Final = 1 << 17
_PIECE: Final = 8 << 20  # bytes that are brought into another order at once


def max_pool(
    dims: int,
    x: Tensor,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] | None = (),
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """What ``max_pool1d``, ``max_pool2d`` and ``max_pool3d`` do, to the bit.

    Args:
        dims: How many of the last axes are pooled.
        x: The images.
        kernel: The size of a window.
        stride: From one window to the next; as large as a window if it is empty or None.
        padding: How far windows reach over the edges.
        dilation: From one element of a window to the next.
        ceil_mode: Whether windows may reach over the end.

    Shape:
        - x: (C, *) or (B, C, *)
        - returns: the same axes, the last ones with an entry for each window
    """
    size = along_axes(kernel, dims)
    others = (along_axes(option, dims) for option in (padding, dilation))
    options = (size, along_axes(stride, dims) or size, *others)
    axes = windows_of(x, dims, options, ceil_mode)
    if axes is not None:
        steps = count_steps(x, axes)
        if not (x.requires_grad and torch.is_grad_enabled()):
            if dims > 1 and steps >= _FEW * count_operations(axes):
                return reduced(x, axes, torch.maximum, -torch.inf)
        elif dims < 3 and steps >= _FEW_WITH_GRADIENTS and not is_observed():
            return _with_gradients(dims, x, options, ceil_mode)
    pooled: Tensor = _POOLS[dims](x, *options, ceil_mode)
    return pooled


def _with_gradients(
    dims: int, x: Tensor, options: Sequence[tuple[int, ...]], ceil_mode: bool
) -> Tensor:
    if dims == 1:  # images of one row, as torch does it
        kernel, stride, padding, dilation = options
        rows = ((1, *kernel), (1, *stride), (0, *padding), (1, *dilation))
        return _with_gradients(2, x.unsqueeze(-2), rows, ceil_mode).squeeze(-2)
    if x.dim() == 3:
        return _with_gradients(2, x.unsqueeze(0), options, ceil_mode).squeeze(0)
    found: Tensor = _MaxPool.apply(x, *options, ceil_mode)  # type: ignore[no-untyped-call]
    return found


class _MaxPool(torch.autograd.Function):
    """``max_pool2d`` by the kernel for channels-last, with torch's own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *options: Any) -> Tensor:
        pieces = torch.split(x, max(1, _PIECE // x[0].nbytes))
        pairs = [_aten.max_pool2d_with_indices(_channels_last(p), *options) for p in pieces]
        y, places = (_joined(list(parts)) for parts in zip(*pairs, strict=True))
        ctx.save_for_backward(x, places)
        ctx.options = options
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, places = ctx.saved_tensors
        found = _aten.max_pool2d_with_indices_backward(gradients[0], x, *ctx.options, places)
        return found, *[None] * len(ctx.options)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _joined(parts: list[Tensor]) -> Tensor:
    """The pieces as one tensor whose channels lie apart."""
    y = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    return torch.cat(parts, out=y)
