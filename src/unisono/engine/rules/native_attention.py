"""torch's native attention of eval mode, for all members in a few calls.

``aten::_native_multi_head_attention`` and ``_transformer_encoder_layer_fwd`` have no derivative,
so what is computed here is written to where it was read from wherever the memory is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import for_each_member, unfolded

_CACHED = 1 << 20  # bytes, for the queries, keys and values of the members that run at once
# From so many bytes of all queries, keys and values on a layer runs in so many pieces, to take no
# more memory than the members one after another; the second is for an input that is overwritten.
_SMALL, _PIECES = 1 << 18, (4, 2)

_native_layer: Callable[..., Tensor] = torch._transformer_encoder_layer_fwd
_CAUSAL, _PADDING, _FULL = 0, 1, 2  # what a mask is: (T, S), (B, S) or (B, H, T, S)


def native_attention(
    n: int,
    query: Operand,
    key: Operand,
    value: Operand,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Operand,
    qkv_bias: Operand,
    weight: Operand,
    bias: Operand,
    mask: Operand | None = None,
    need_weights: bool = True,
    average_weights: bool = True,
    mask_type: int | None = None,
) -> list[Operand | None] | None:
    """Self-attention of all members, (N, B, T, E) -> (N, B, T, E) and its weights.

    One product for the queries, keys and values, one attention over N * B examples, one product
    behind it. Queries that aren't the keys are left to the members one by one.
    """
    is_self = query[0] is key[0] is value[0]
    operands = (query, qkv_weight, qkv_bias, weight, bias)
    if not is_self or not _is_plain(mask, *operands):
        return None
    x, w_qkv, b_qkv, w, b = (for_each_member(operand, n) for operand in operands)
    q, k, v = _heads(x, w_qkv, b_qkv, num_heads)
    blocked = None if mask is None else _blocked(mask, n, x.shape[1], mask_type)
    weights = None
    if need_weights:
        scores = torch.matmul(q * (q.shape[-1] ** -0.5), k.mT)  # (N * B, H, T, S)
        if blocked is not None:
            scores.masked_fill_(blocked, -torch.inf)
        probabilities = scores.softmax(-1)
        y = torch.matmul(probabilities, v).transpose(1, 2)
        weights = probabilities.mean(1) if average_weights else probabilities
        weights = unfolded(weights, 0, n)
    else:
        y = _attend(q, k, v, blocked)
    rows = y.reshape(n, -1, embed_dim)  # (N, B * T, E)
    out = torch.baddbmm(b.unsqueeze(1), rows, w.mT).view(x.shape)
    return [(out, 0), None if weights is None else (weights, 0)]


def encoder_layer(
    n: int,
    x: Operand,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Operand,
    qkv_bias: Operand,
    weight: Operand,
    bias: Operand,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Operand,
    norm1_bias: Operand,
    norm2_weight: Operand,
    norm2_bias: Operand,
    weight1: Operand,
    bias1: Operand,
    weight2: Operand,
    bias2: Operand,
    mask: Operand | None = None,
    mask_type: int | None = None,
    *,
    overwrites: bool = False,
) -> Operand | None:
    """One Transformer encoder layer of all members, (N, B, T, E) -> (N, B, T, E).

    So many members at a time as keep what lies between input and output in the processor's cache;
    a single one by torch's own op, which has no pass of its own for scale and shift of the norms.
    With ``overwrites`` the input has no other reader, and its memory may hold the result.
    """
    weights = (
        *(qkv_weight, qkv_bias, weight, bias),
        *(norm1_weight, norm1_bias, norm2_weight, norm2_bias),
        *(weight1, bias1, weight2, bias2),
    )
    if not _is_plain(mask, x, *weights):
        return None
    value = for_each_member(x, n)
    own = [for_each_member(operand, n) for operand in weights]
    overwrites = overwrites and x[1] is not None
    y = value if overwrites else value.new_empty(value.shape)
    size = _members_at_once(n, 3 * value.nbytes, overwrites=overwrites)
    if value.device.type != "cpu":
        size = n
    if size == 1:
        masks = [None] * n if mask is None else for_each_member(mask, n).unbind()
        before, between = (embed_dim, num_heads), (use_gelu, norm_first, eps)
        columns: Iterator[Any] = zip(
            value.unbind(), y.unbind(), masks, *(tensor.unbind() for tensor in own), strict=True
        )
        for own_x, own_y, own_mask, *w in columns:
            own_y.copy_(
                _native_layer(own_x, *before, *w[:4], *between, *w[4:], own_mask, mask_type)
            )
        return y, 0
    blocked = None if mask is None else _blocked(mask, n, value.shape[1], mask_type)
    options = (num_heads, eps, use_gelu, norm_first)
    if size == n:
        _encode(value, own, blocked, y, *options)
        return y, 0
    batch = value.shape[1]
    for start in range(0, n, size):
        some = slice(start, start + size)
        examples = slice(start * batch, (start + size) * batch)
        mine = blocked if blocked is None or len(blocked) == 1 else blocked[examples]
        _encode(value[some], [tensor[some] for tensor in own], mine, y[some], *options)
    return y, 0


def _members_at_once(n: int, nbytes: int, *, overwrites: bool) -> int:
    """How many members run at once; the bytes are those of all queries, keys and values."""
    if nbytes <= _SMALL:
        return n
    return max(1, min(_CACHED * n // nbytes, -(-n // _PIECES[overwrites])))


def _encode(
    x: Tensor,
    weights: list[Tensor],
    blocked: Tensor | None,
    out: Tensor,
    num_heads: int,
    eps: float,
    use_gelu: bool,
    norm_first: bool,
) -> None:
    """Write one layer of (N, B, T, E) into ``out``; ``rows += b; rows += y @ w`` in place."""
    n, batch, length, embed_dim = x.shape
    w_qkv, b_qkv, w, b, *norms, w1, b1, w2, b2 = weights
    n1w, n1b, n2w, n2b = (norm.unsqueeze(1) for norm in norms)

    def normed(y: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None) -> Tensor:
        y = F.layer_norm(y, (embed_dim,), eps=eps)
        return torch.addcmul(shift, y, scale, out=y if out is None else out)

    rows = x.reshape(n, batch * length, embed_dim)
    seen = normed(rows, n1w, n1b) if norm_first else rows
    q, k, v = _heads(seen.view(x.shape), w_qkv, b_qkv, num_heads)
    del seen
    y = _attend(q, k, v, blocked).reshape(rows.shape)
    del q, k, v  # the largest tensor of the layer
    rows = (rows + b.unsqueeze(1)).baddbmm_(y, w.mT)
    if not norm_first:
        rows = normed(rows, n1w, n1b)
    y = normed(rows, n2w, n2b) if norm_first else rows
    hidden = torch.baddbmm(b1.unsqueeze(1), y, w1.mT)
    hidden = torch.ops.aten.gelu_(hidden) if use_gelu else hidden.relu_()
    rows = rows.add_(b2.unsqueeze(1)).baddbmm_(hidden, w2.mT)
    if norm_first:
        out.copy_(rows.view(x.shape))
    else:
        normed(rows, n2w, n2b, out.view(rows.shape))


def _is_plain(mask: Operand | None, x: Operand, *operands: Operand) -> bool:
    """Whether these are dense tensors, without gradient, and members differ in one of them."""
    if torch.is_grad_enabled() or any(value.is_nested for value, _ in (x, *operands)):
        return False
    if torch.is_autocast_enabled(x[0].device.type):
        return False  # products that write in place don't cast
    if x[0].dim() - (x[1] is not None) != 3 or x[0].numel() == 0:
        return False
    masks = () if mask is None else (mask,)
    return any(dim is not None for _, dim in (x, *operands, *masks))


def _heads(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, (N, B, T, E) -> three of (N * B, H, T, E / H), without a copy."""
    n, batch, length, embed_dim = x.shape
    rows = x.reshape(n, batch * length, embed_dim)
    qkv = torch.baddbmm(bias.unsqueeze(1), rows, weight.mT)  # (N, B * T, 3 * E)
    heads = qkv.view(n * batch, length, 3, num_heads, embed_dim // num_heads)
    return heads.permute(2, 0, 3, 1, 4).unbind()


def _attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None) -> Tensor:
    """Attention over all examples, three of (N * B, H, T, D) -> (N * B, T, H, D)."""
    if blocked is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, ~blocked)
    nothing_to_attend = blocked.all(-1, keepdim=True)  # torch's native attention gives nan
    return y.masked_fill_(nothing_to_attend, torch.nan).transpose(1, 2)


def _blocked(mask: Operand, n: int, batch: int, mask_type: int | None) -> Tensor:
    """Where no attention is paid, as something that broadcasts with (N * B, H, T, S)."""
    value = for_each_member(mask, n).to(torch.bool)  # torch takes any non-zero number for True
    if mask_type == _PADDING:
        return value.reshape(n * batch, 1, 1, -1)
    if mask_type == _CAUSAL:
        value = value[:, None, None]  # (N, 1, 1, T, S)
        value = value.expand(n, batch, *value.shape[2:])
    return value.flatten(0, 1)
