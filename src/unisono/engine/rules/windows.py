"""Windows of a pool, one axis after another, as ops on whole tensors.

Where the channels of images lie apart, torch's pools go through the windows element by element. A
maximum or a sum over a window is one over its rows' maxima or sums, so each axis can be reduced for
all windows at once, in a fraction of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from unisono.engine.axis import has_tangents, is_transformed

_TINY: Final = 1 << 12  # elements, of which to find out more takes longer than to pool them

Combine = Callable[..., Tensor]
"""`torch.maximum` or `torch.add`."""


class Windows(NamedTuple):
    """Where the windows lie along one axis."""

    size: int  # of the input
    kernel: int
    stride: int
    padding: int
    dilation: int
    ceil_mode: bool

    def number(self) -> int:
        """How many there are; with ``ceil_mode`` they may reach over the end, but not begin there.

        What lies beyond the padding is no part of the last one.
        """
        room = self.size + 2 * self.padding - self.dilation * (self.kernel - 1) - 1
        if not self.ceil_mode:
            return room // self.stride + 1
        number = -(-room // self.stride) + 1
        return number - ((number - 1) * self.stride >= self.size + self.padding)

    def is_valid(self) -> bool:
        """Whether torch takes these options; what it doesn't it has to say itself."""
        is_positive = min(self.kernel, self.stride, self.dilation) >= 1
        return is_positive and 0 <= 2 * self.padding <= self.kernel and self.number() >= 1

    def is_trivial(self) -> bool:
        """Whether each window is one element, and no element is without one."""
        return self.kernel == self.stride == 1 and not self.padding

    def elements(self, x: Tensor, axis: int) -> Iterator[tuple[int, Tensor]]:
        """The first element of each window, the second, ...: views of ``x``.

        Those in the padding are left out. With each view comes the first window that is in it.
        """
        number = self.number()
        for k in range(self.kernel):
            offset = k * self.dilation - self.padding
            first = max(0, -(offset // self.stride))
            last = min(number - 1, (self.size - 1 - offset) // self.stride)
            if first <= last:
                start, length = first * self.stride + offset, (last - first) * self.stride + 1
                part = x.narrow(axis, start, length)
                yield first, part.unfold(axis, 1, self.stride)[..., 0]


def along_axes(option: int | Sequence[int] | None, dims: int) -> tuple[int, ...]:
    """An entry for each axis; one alone is meant for all."""
    entries = (option,) if isinstance(option, int) else tuple(option or ())
    return entries * (dims if len(entries) == 1 else 1)


def windows_of(
    x: Tensor, dims: int, options: Sequence[tuple[int, ...]], ceil_mode: bool
) -> list[Windows] | None:
    """The windows along each of the last axes; None where the pool had better be left to torch.

    Args:
        x: The images.
        dims: How many of the last axes are pooled.
        options: Kernel, stride, padding and dilation.
        ceil_mode: Whether windows may reach over the end.
    """
    if (
        type(x) is not Tensor
        or x.numel() < _TINY
        or x.dim() not in (dims + 1, dims + 2)
        or x.device.type != "cpu"
        or not x.is_floating_point()
        or x.stride(-1) != 1  # torch has another kernel for channels-last
        or torch.compiler.is_compiling()
        or torch.compiler.is_exporting()
        or is_transformed()
        or has_tangents()
        or any(len(option) != dims for option in options)
    ):
        return None
    kernel, stride, padding, dilation = options
    columns = zip(x.shape[-dims:], kernel, stride, padding, dilation, strict=True)
    axes = [Windows(*column, ceil_mode) for column in columns]
    return axes if all(axis.is_valid() for axis in axes) else None


def count_steps(x: Tensor, axes: Sequence[Windows]) -> int:
    """How many elements all windows have together, which torch visits one by one."""
    windows = math.prod(axis.number() * axis.kernel for axis in axes)
    return math.prod(x.shape[: -len(axes)]) * windows


def count_operations(axes: Sequence[Windows]) -> int:
    """How many operations `reduced` takes."""
    return sum(axis.kernel for axis in axes if not axis.is_trivial())


def reduced(x: Tensor, axes: Sequence[Windows], combine: Combine, neutral: float) -> Tensor:
    """Combine the elements of each window, in new memory.

    The last axis comes last: along the others whole rows are combined, and fewer remain.

    Args:
        x: The images, without a gradient to record.
        axes: The windows along each of the last axes.
        combine: ``combine(a, b, out=a)``.
        neutral: What changes nothing when it is combined.
    """
    y = x
    for axis, windows in enumerate(axes, start=-len(axes)):
        if not windows.is_trivial():
            y = _reduced_along(y, axis, windows, combine, neutral)
    return y.clone(memory_format=torch.contiguous_format) if y is x else y


def _reduced_along(
    x: Tensor, axis: int, windows: Windows, combine: Combine, neutral: float
) -> Tensor:
    number = windows.number()
    elements = list(windows.elements(x, axis))
    whole = [view for _, view in elements if view.shape[axis] == number]
    if len(whole) > 1:
        y = combine(whole[0], whole[1])
    elif whole:
        y = whole[0].clone(memory_format=torch.contiguous_format)
    else:
        shape = list(x.shape)
        shape[axis] = number
        y = x.new_full(shape, neutral)
    for view in whole[2:]:
        combine(y, view, out=y)
    for first, view in elements:
        if view.shape[axis] < number:
            part = y.narrow(axis, first, view.shape[axis])
            combine(part, view, out=part)
    return y
