"""``aten::scaled_dot_product_attention``: the members are more of the batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono.engine.axis import Operand
from unisono.engine.kernels import draws_independently
from unisono.engine.rules.layout import for_each_member, members_first


def attention(
    n: int,
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Operand | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Operand | None:
    """``y[i] = softmax(query[i] @ key[i].T * scale + mask[i]) @ value[i]``; (N, *, L, E).

    On a CPU torch's own rule runs the members one after another. Folded into the batch they run
    in one call of the fused kernel, and dropout draws for each. Only where every member has to
    draw the same numbers, or none at all, they run one by one.
    """
    inputs = [operand for operand in (query, key, value, mask) if operand is not None]
    if all(dim is None for _, dim in inputs) or (dropout_p > 0.0 and not draws_independently()):
        return None
    q, k, v = (for_each_member(operand, n) for operand in (query, key, value))  # (N, *, L, E)
    if not q.dim() == k.dim() == v.dim():
        return None
    shapes = (q.shape[1:-3], k.shape[1:-3], v.shape[1:-3])
    batch = torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
    q, k, v = (_fold_batch(tensor, n, batch) for tensor in (q, k, v))  # (N * B, H, L, E)
    folded_mask = None if mask is None else _fold_mask(mask, n, batch)
    y = F.scaled_dot_product_attention(
        q, k, v, folded_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    heads = y.shape[1:] if query[0].dim() - (query[1] is not None) > 2 else y.shape[2:]
    return y.reshape(n, *batch, *heads), 0


def _fold_batch(tensor: Tensor, n: int, batch: tuple[int, ...]) -> Tensor:
    """(N, *batch, H, L, E) -> (N * B, H, L, E); one head for (N, L, E)."""
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
    rest = tensor.shape[-3:]
    missing = len(batch) - (tensor.dim() - 4)
    tensor = tensor.reshape(n, *[1] * missing, *tensor.shape[1:])
    return tensor.expand(n, *batch, *rest).reshape(-1, *rest)


def _fold_mask(mask: Operand, n: int, batch: tuple[int, ...]) -> Tensor:
    """The mask as something that broadcasts with (N * B, H, L, S)."""
    value = members_first(mask)
    if mask[1] is None and value.dim() <= 3:  # (L, S) or (H, L, S): one for members and batch
        return value
    value = for_each_member(mask, n)
    own = value.shape[1:]  # (..., L, S)
    full = (*[1] * (len(batch) + 3 - len(own)), *own)  # (*batch or 1, H or 1, L, S)
    value = value.reshape(n, *full).expand(n, *batch, *full[-3:])
    return value.reshape(-1, *full[-3:])
