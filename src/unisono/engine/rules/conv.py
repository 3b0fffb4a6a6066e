"""``aten::conv1d``, ``conv2d``, ``conv3d``: members as groups of one convolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unisono.engine.axis import Operand
from unisono.engine.rules.conv_pointwise import pointwise
from unisono.engine.rules.conv_separate import Geometry, along_axes, separate
from unisono.engine.rules.layout import folded, for_each_member, members_first, unfolded

_LARGE = 1e7  # floating-point operations of one member
_CONV: dict[int, Callable[..., Tensor]] = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


def conv(
    n: int,
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] | str = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Operand | None:
    """Convolve ``x[i]`` with ``weight[i]`` and add ``bias[i]``; (N, B, C, *) -> (N, B, O, *).

    - one weight for all members: the members are more of the batch;
    - one input for all members: their filters are N * O filters of one convolution;
    - both per member: N * groups groups, channels of a member side by side; or, where the
      convolutions are large, one after another: in torch's usual memory format, oneDNN is slow
      on large grouped convolutions.

    The result is physically (B, N * O, *), the layout in which the next convolution or batch
    norm takes it without a copy, and (B, *, N * O) if the weights are stored in channels-last
    order. The bias is part of the convolution, not a pass of its own.
    """
    convolve = _CONV[weight[0].dim() - 2 - (weight[1] is not None)]
    options = (stride, padding, dilation)
    if x[0].dim() - (x[1] is not None) < weight[0].dim() - (weight[1] is not None):
        return None  # an input without batch axis: not worth a formulation of its own
    bias_is_stacked = bias is not None and bias[1] is not None
    if weight[1] is None and not bias_is_stacked:
        shared_bias = None if bias is None else bias[0]
        if x[1] is None:
            return convolve(x[0], weight[0], shared_bias, *options, groups), None
        y = convolve(folded(x, 0, n), weight[0], shared_bias, *options, groups)
        return unfolded(y, 0, n), 0
    if x[1] is None and weight[1] is not None:
        return _on_shared_input(convolve, n, x[0], members_first(weight), bias, options, groups)
    if groups == 1 and None not in (x[1], weight[1]) and (bias is None or bias_is_stacked):
        found = pointwise(x, weight, bias, stride, padding)
        if found is not None:
            return found, 1
    b = None if bias is None else folded(bias, 0, n)
    if is_channels_last(weight):
        y = convolve(channels_last(x, n), _filters(weight[0]), b, *options, n * groups)
    elif groups == 1 and weight[1] is not None and is_large(n, x[0], weight[0], stride):
        return one_by_one(convolve, n, x, weight, bias, options, _geometry(weight, *options))
    else:
        w = folded(weight, 0, n)  # (N * O, C / groups, *)
        y = convolve(folded(x, 1, n), w, b, *options, n * groups)
    return unfolded(y, 1, n), 1


def _on_shared_input(
    convolve: Callable[..., Tensor],
    n: int,
    x: Tensor,
    weight: Tensor,
    bias: Operand | None,
    options: tuple[object, ...],
    groups: int,
) -> Operand:
    """All members' filters on one input (B, C, *); the input is not repeated.

    Filters that see the same group of channels lie side by side: (G, N, O / G) of them.
    """
    b = None if bias is None else for_each_member(bias, n)
    if groups == 1:
        w = _filters(weight) if is_channels_last((weight, 0)) else folded((weight, 0), 0, n)
        y = convolve(x, w, None if b is None else b.flatten(), *options, 1)
        return unfolded(y, 1, n), 1

    def side_by_side(filters: Tensor) -> Tensor:
        own = filters.reshape(n, groups, filters.shape[1] // groups, *filters.shape[2:])
        return own.transpose(0, 1).flatten(0, 2)

    y = convolve(x, side_by_side(weight), None if b is None else side_by_side(b), *options, groups)
    y = y.reshape(y.shape[0], groups, n, y.shape[1] // groups // n, *y.shape[2:])
    return y.transpose(1, 2).flatten(2, 3), 1  # (B, N, O, *)


def is_channels_last(weight: Operand) -> bool:
    """Whether the filters (N, O, C, *) are stored as (N, O, *, C)."""
    value, dim = weight
    if dim != 0 or value.dim() < 5:
        return False
    channels = value.shape[2]
    return value.stride(2) == 1 and value.stride(-1) == channels and value[0, 0].numel() > 1


def channels_last(x: Operand, n: int) -> Tensor:
    """(N, B, C, *) -> (B, N * C, *), in memory (B, *, N * C)."""
    value = for_each_member(x, n)
    spatial = range(3, value.dim())
    y = value.permute(1, *spatial, 0, 2).flatten(-2)  # (B, *, N * C)
    return y.movedim(-1, 1)


def _filters(value: Tensor) -> Tensor:
    """(N, O, C, *) -> (N * O, C, *) with the very strides, also of an axis of length 1.

    Convolutions look at them to see which order is meant; a view would make them up anew.
    """
    if value.shape[2] > 1:
        return value.flatten(0, 1)
    shape = (value.shape[0] * value.shape[1], *value.shape[2:])
    return value.as_strided(shape, value.stride()[1:], value.storage_offset())


def is_large(n: int, x: Tensor, weight: Tensor, stride: Sequence[int] = ()) -> bool:
    """Whether on a CPU the convolutions are faster one by one than as groups of one.

    Measured on 2 AVX-512 cores: as groups up to twice as fast at 7 million operations per member,
    up to five times slower from 14 million on.
    """
    # In an export it would be an answer for some sizes of a batch, which may not be fixed.
    if x.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    spatial = weight.dim() - 3
    positions = x.numel() / (x.shape[-spatial - 1] * math.prod(stride))  # N * B * outputs, nearly
    return 2 * weight.numel() / n * positions / n > _LARGE


def _geometry(
    weight: Operand, stride: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]
) -> Geometry | None:
    """The options with an entry for each spatial axis; None where they are not numbers."""
    if isinstance(padding, str):
        return None
    spatial = weight[0].dim() - 3
    return Geometry(
        along_axes(stride, spatial), along_axes(padding, spatial), along_axes(dilation, spatial)
    )


def one_by_one(
    convolve: Callable[..., Tensor],
    n: int,
    x: Operand,
    weight: Operand,
    bias: Operand | None,
    options: tuple[object, ...],
    geometry: Geometry | None,
) -> Operand:
    """The convolutions of the members one after another, joined as `conv` leaves them."""
    if geometry is not None and x[1] is not None:
        own_bias = None if bias is None else for_each_member(bias, n)
        y = separate(members_first(x), members_first(weight), own_bias, geometry)
        if y is not None:
            return y, 1
    biases = [None] * n if bias is None else for_each_member(bias, n)
    columns = zip(members_first(x), members_first(weight), biases, strict=True)
    ys = [convolve(*column, *options) for column in columns]  # N of (B, O, *)
    return unfolded(torch.cat(ys, 1), 1, n), 1  # (B, N, O, *), in the memory format of each
