"""``aten::conv_transpose1d``, ``2d``, ``3d``: members as groups of one transposed convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unisono.engine.axis import Operand
from unisono.engine.rules.conv import is_large, one_by_one
from unisono.engine.rules.conv_separate import Geometry, along_axes
from unisono.engine.rules.layout import folded, unfolded

_CONV: dict[int, Callable[..., Tensor]] = {
    1: torch.conv_transpose1d,
    2: torch.conv_transpose2d,
    3: torch.conv_transpose3d,
}


def conv_transpose(
    n: int,
    x: Operand,
    weight: Operand,
    bias: Operand | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> Operand | None:
    """Transposed convolution of ``x[i]`` with ``weight[i]``; (N, B, C, *) -> (N, B, O, *).

    As in `conv`: a shared weight makes the members more of the batch, otherwise they are
    N * groups groups with the bias inside, physically (B, N * O, *).
    """
    weight_dim = weight[0].dim() - (weight[1] is not None)
    convolve = _CONV[weight_dim - 2]
    if x[0].dim() - (x[1] is not None) < weight_dim:
        return None  # an input without batch axis
    options = (stride, padding, output_padding, groups, dilation)
    bias_is_stacked = bias is not None and bias[1] is not None
    if weight[1] is None and not bias_is_stacked:
        shared_bias = None if bias is None else bias[0]
        if x[1] is None:
            return convolve(x[0], weight[0], shared_bias, *options), None
        return unfolded(convolve(folded(x, 0, n), weight[0], shared_bias, *options), 0, n), 0
    if groups == 1 and None not in (x[1], weight[1]) and is_large(n, x[0], weight[0]):
        spatial = weight_dim - 2
        geometry = Geometry(
            along_axes(stride, spatial),
            along_axes(padding, spatial),
            along_axes(dilation, spatial),
            is_transposed=True,
            output_padding=along_axes(output_padding, spatial),
        )
        return one_by_one(convolve, n, x, weight, bias, options, geometry)
    b = None if bias is None else folded(bias, 0, n)
    if x[1] is None and groups == 1:
        y = convolve(x[0], folded(weight, 1, n), b, *options)  # filters (C, N * O, *)
    else:
        options = (stride, padding, output_padding, n * groups, dilation)
        y = convolve(folded(x, 1, n), folded(weight, 0, n), b, *options)
    return unfolded(y, 1, n), 1
