"""``aten::conv1d``, ``conv2d``, ``conv3d``: members as groups of one convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import folded, unfolded

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
    - both per member: N * groups groups, channels of a member side by side.

    The result is physically (B, N * O, *), the layout in which the next convolution or batch
    norm takes it without a copy. The bias is part of the convolution, not a pass of its own.
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
    w = folded(weight, 0, n)  # (N * O, C / groups, *)
    b = None if bias is None else folded(bias, 0, n)
    if x[1] is None and groups == 1:
        y = convolve(x[0], w, b, *options, 1)
    else:
        y = convolve(folded(x, 1, n), w, b, *options, n * groups)
    return unfolded(y, 1, n), 1
