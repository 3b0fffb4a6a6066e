"""``aten::layer_norm`` and ``rms_norm``: one pass to normalise, one for the affine parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono.engine.axis import Operand, has_tangents, is_observed
from unisono.engine.rules.layout import members_first


def layer_norm(
    n: int,
    x: Operand,
    normalized_shape: Sequence[int],
    weight: Operand | None = None,
    bias: Operand | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Operand | None:
    """``y[i] = (x[i] - mean) / sqrt(var + eps) * weight[i] + bias[i]``; (N, *) -> (N, *).

    Torch's own rule takes one pass for the weight and one for the bias. An ``x`` that is the
    same for all members is normalised once.
    """
    if _is_same(weight) and _is_same(bias):
        w, b = (None if operand is None else operand[0] for operand in (weight, bias))
        y = F.layer_norm(members_first(x), normalized_shape, w, b, eps)
        return y, None if x[1] is None else 0
    y = F.layer_norm(members_first(x), normalized_shape, eps=eps)
    return _scaled(y, x[1] is None, weight, bias, len(normalized_shape)), 0


def rms_norm(
    n: int,
    x: Operand,
    normalized_shape: Sequence[int],
    weight: Operand | None = None,
    eps: float | None = None,
) -> Operand | None:
    """``y[i] = x[i] / sqrt(mean(x[i] ** 2) + eps) * weight[i]``; (N, *) -> (N, *).

    Torch's own rule takes the op apart into six passes, also where it has one kernel for it.
    """
    if _is_same(weight):
        w = None if weight is None else weight[0]
        y = F.rms_norm(members_first(x), list(normalized_shape), w, eps)
        return y, None if x[1] is None else 0
    y = F.rms_norm(members_first(x), list(normalized_shape), None, eps)
    return _scaled(y, x[1] is None, weight, None, len(normalized_shape)), 0


def _is_same(operand: Operand | None) -> bool:
    return operand is None or operand[1] is None


def _scaled(
    y: Tensor, is_shared: bool, weight: Operand | None, bias: Operand | None, dims: int
) -> Tensor:
    """``y * weight + bias`` with (N, *shape) parameters over the last ``dims`` axes of ``y``."""
    if is_shared:
        y = y.unsqueeze(0)
    w, b = (None if p is None else _behind(p, y.dim(), dims) for p in (weight, bias))
    if w is None:
        result = y if b is None else y + b
    elif b is not None and not is_shared and _is_writable(y, w, b):
        return torch.addcmul(b, y, w, out=y)
    else:
        result = y * w if b is None else torch.addcmul(b, y, w)
    return result.to(y.dtype)  # parameters of another type don't change that of the result


def _is_writable(y: Tensor, *others: Tensor) -> bool:
    """Whether nothing needs the fresh ``y``, and nobody around listens, so it can be written to."""
    return (
        not torch.is_grad_enabled()
        and all(other.dtype == y.dtype for other in others)
        and not torch.compiler.is_compiling()
        and not is_observed()
        and not has_tangents()
    )


def _behind(operand: Operand, total: int, dims: int) -> Tensor:
    """A parameter (N, *shape) as (N, 1, ..., 1, *shape) with ``total`` axes."""
    value = members_first(operand)
    if operand[1] is None:
        return value
    return value.reshape(value.shape[0], *[1] * (total - 1 - dims), *value.shape[1:])
