"""Two layers that together do less than one after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

from unisono.engine.axis import Operand, is_observed, parameters_of
from unisono.engine.rules.conv import conv
from unisono.engine.steps.layers import CONVS
from unisono.engine.steps.pooling import MAX_POOLS
from unisono.engine.steps.step import Look, Run, Step

_MANY: Final = 1 << 18  # results of a convolution: below, changing the filters takes longer


def joined(steps: Sequence[Step]) -> list[Step]:
    """The steps of a chain, some of which know what they do better together with the next one."""
    found = list(steps)
    for k, (step, behind) in enumerate(itertools.pairwise(steps)):
        if type(step.module) in CONVS and type(behind.module) in (nn.BatchNorm2d, nn.BatchNorm3d):
            found[k] = step._replace(with_next=_conv_and_norm(step.module, behind.module))
        elif type(step.module) is nn.ReLU and type(behind.module) in MAX_POOLS:
            found[k] = step._replace(with_next=_pool_and_relu(behind))
    return found


def pays_to_fold(results: float, filters: int) -> bool:
    """Whether a norm is better folded into the convolution: of many results, more than filters."""
    return results >= max(_MANY, 4 * filters)


def _conv_and_norm(convolution: Any, norm: Any) -> Run:
    """Scale and shift of a norm by running statistics, in the filters and the bias.

    ``norm(conv(x, w, b)) = conv(x, w * s, b * s + shift)`` with ``s = weight / sqrt(var + eps)``.
    """
    own: Any = parameters_of(convolution)
    of_norm: Any = parameters_of(norm)

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        if (
            torch.is_grad_enabled()
            or norm.training
            or norm.running_mean is None
            or norm.running_var is None
        ):
            return None
        w, dim = look(own["weight"])
        spatial = w.dim() - 3
        if dim != 0 or w.dtype not in (torch.float32, torch.float64) or x[0].dtype != w.dtype:
            return None
        if x[0].dim() - (x[1] is not None) != spatial + 2 or is_observed():
            return None
        if torch.is_autocast_enabled(x[0].device.type):
            return None  # it would round the changed filters
        examples = x[0].numel() / x[0].shape[-spatial - 1] * (1 if x[1] is not None else n)
        results = examples / math.prod(convolution.stride) * w.shape[1]
        if not pays_to_fold(results, w.numel()):
            return None
        parts = (of_norm["weight"], of_norm["bias"], own["bias"])
        weight, bias, b = (None if part is None else look(part) for part in parts)
        mean, var = look(norm.running_mean), look(norm.running_var)
        if any(part is not None and part[1] != 0 for part in (weight, bias, b, mean, var)):
            return None  # shared by all members
        scale = (var[0] + norm.eps).rsqrt_()  # (N, O)
        if weight is not None:
            scale.mul_(weight[0])
        shift = (mean[0] if b is None else mean[0] - b[0]) * scale
        shift = shift.neg_() if bias is None else torch.sub(bias[0], shift, out=shift)
        scaled = torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=w.device)
        torch.mul(w, scale.view(*scale.shape, *[1] * (spatial + 1)), out=scaled)
        options = (convolution.stride, convolution.padding, convolution.dilation)
        return conv(n, x, (scaled, 0), (shift, 0), *options, convolution.groups)

    return run


def _pool_and_relu(pool: Step) -> Run:
    """``relu`` keeps the order, so its largest result is that of the largest, to the bit.

    So are the gradients: of a window without a positive value they are zero either way.
    """

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        found = None if pool.run is None else pool.run(n, x, look)
        if found is None:
            return None
        # The result of the pool may be a view, and with gradients those are copied to be written.
        relu = torch.relu if torch.is_grad_enabled() else torch.relu_
        return relu(found[0]), found[1]

    return run
