"""Average pooling, faster than torch where the channels of images lie apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from unisono.engine.axis import is_observed
from unisono.engine.rules.windows import (
    Windows,
    along_axes,
    count_operations,
    count_steps,
    reduced,
    windows_of,
)

_aten: Final = torch.ops.aten
_POOLS: Final = {d: getattr(_aten, f"avg_pool{d}d").default for d in (1, 2, 3)}
# With so few additions for each operation of ours torch is as fast, and with large windows that
# hardly overlap, of which it sums whole rows; measured on 2 AVX-512 cores. The second number is for
# calls with gradients.
_FEW: Final = (1 << 14, 1 << 16)
_LARGE: Final = (5, 3)
_OVERLAP: Final = (1.5, 2.2)  # windows in which an element is


class Divisor(NamedTuple):
    """By what the sum of a window is divided."""

    counts_padding: bool  # whether the padding is elements, too
    instead: int | None  # by what, however many elements there are


def avg_pool(
    dims: int,
    x: Tensor,
    kernel: int | Sequence[int],
    stride: int | Sequence[int] | None = (),
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """What ``avg_pool1d``, ``avg_pool2d`` and ``avg_pool3d`` do.

    Args:
        dims: How many of the last axes are pooled.
        x: The images.
        kernel: The size of a window.
        stride: From one window to the next; as large as a window if it is empty or None.
        padding: How far windows reach over the edges, with zeros.
        ceil_mode: Whether windows may reach over the end.
        count_include_pad: Whether these zeros are elements of which the mean is taken.
        divisor_override: By what the sums are divided instead of the number of elements.

    Shape:
        - x: (C, *) or (B, C, *)
        - returns: the same axes, the last ones with an entry for each window
    """
    size = along_axes(kernel, dims)
    options = (size, along_axes(stride, dims) or size, along_axes(padding, dims))
    axes = windows_of(x, dims, (*options, (1,) * dims), ceil_mode)
    if axes is not None and x.dtype in (torch.float32, torch.float64) and divisor_override != 0:
        divisor = Divisor(count_include_pad, divisor_override)
        with_gradients = x.requires_grad and torch.is_grad_enabled()
        if _pays(x, axes, with_gradients=with_gradients):
            if not with_gradients:
                return _means(x, axes, divisor)
            if not is_observed():
                found: Tensor = _AvgPool.apply(x, axes, divisor)  # type: ignore[no-untyped-call]
                return found
    override = (divisor_override,) if dims > 1 else ()
    pooled: Tensor = _POOLS[dims](x, *options, ceil_mode, count_include_pad, *override)
    return pooled


def _pays(x: Tensor, axes: Sequence[Windows], *, with_gradients: bool) -> bool:
    steps = count_steps(x, axes)
    overlaps = steps >= _OVERLAP[with_gradients] * x.numel()
    is_small = max(axis.kernel for axis in axes) < _LARGE[with_gradients]
    is_large = steps >= _FEW[with_gradients] * count_operations(axes)
    return is_large and (overlaps or is_small)


def _means(x: Tensor, axes: Sequence[Windows], divisor: Divisor) -> Tensor:
    return _divide(reduced(x, axes, torch.add, 0.0), axes, divisor)


def _divide(sums: Tensor, axes: Sequence[Windows], divisor: Divisor) -> Tensor:
    """Divide each sum in place by the number of its elements."""
    if divisor.instead is not None:
        return sums.div_(divisor.instead)
    counts = [_counts(axis, counts_padding=divisor.counts_padding) for axis in axes]
    if all(min(own) == max(own) for own in counts):
        return sums.div_(math.prod(own[0] for own in counts))
    of_window = torch.ones((), dtype=sums.dtype)
    for own in counts:
        of_window = of_window.unsqueeze(-1) * torch.tensor(own, dtype=sums.dtype)
    return sums.div_(of_window)


def _counts(axis: Windows, *, counts_padding: bool) -> list[int]:
    """How many elements each window has along an axis."""
    first, end = (-axis.padding, axis.size + axis.padding) if counts_padding else (0, axis.size)
    starts = [k * axis.stride - axis.padding for k in range(axis.number())]
    return [min(start + axis.kernel, end) - max(start, first) for start in starts]


class _AvgPool(torch.autograd.Function):
    """Average pooling; backward spreads the gradients, one axis after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axes: Sequence[Windows], divisor: Divisor) -> Tensor:
        ctx.axes, ctx.divisor = axes, divisor
        return _means(x, axes, divisor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Spread.apply(gradients[0], ctx.axes, ctx.divisor), None, None  # type: ignore[no-untyped-call]


class _Spread(torch.autograd.Function):
    """The gradient of average pooling, whose own gradient is average pooling."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, axes: Sequence[Windows], divisor: Divisor) -> Tensor:
        ctx.axes, ctx.divisor = axes, divisor
        found = _divide(y.clone(memory_format=torch.contiguous_format), axes, divisor)
        for axis, windows in reversed(list(enumerate(axes, start=-len(axes)))):
            if not windows.is_trivial():
                found = _spread_along(found, axis, windows)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _AvgPool.apply(gradients[0], ctx.axes, ctx.divisor), None, None  # type: ignore[no-untyped-call]


def _spread_along(y: Tensor, axis: int, windows: Windows) -> Tensor:
    """Add what is at each window to all of its elements."""
    shape = list(y.shape)
    shape[axis] = windows.size
    x = y.new_zeros(shape)
    for first, view in windows.elements(x, axis):
        view.add_(y.narrow(axis, first, view.shape[axis]))
    return x
