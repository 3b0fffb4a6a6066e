"""torch's native attention of eval mode, for all members in a few calls.

``aten::_native_multi_head_attention`` and ``_transformer_encoder_layer_fwd`` have no derivative,
so what is computed here is written to where it was read from wherever the memory is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import for_each_member, unfolded

_CACHED = 1 << 20  # bytes, for the queries, keys and values of the members that run at once
_SMALL = 1 << 18  # bytes, for the same, up to which nobody minds what a layer takes
_ROOM = 2.3  # times the bytes of the input, for what a larger layer takes besides its result

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
    overwrites = overwrites and x[1] == 0 and value.is_contiguous()
    y = value if overwrites else value.new_empty(value.shape)
    size = max(1, min(n, _CACHED * n // (3 * value.nbytes)))
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
    layer = _Layer(num_heads, eps, use_gelu, norm_first, own)
    for part, of_x, of_y, of_mask in _parts(size, layer, value, y, blocked):
        _encode(part, of_x, of_mask, of_y)
    return y, 0


class _Layer(NamedTuple):
    """Options and weights of one encoder layer, each of the weights with the members in front."""

    num_heads: int
    eps: float
    use_gelu: bool
    norm_first: bool
    weights: Sequence[Tensor]

    def attend(self, x: Tensor, blocked: Tensor | None, out: Tensor) -> None:
        """Write ``x + attention(x)`` into ``out``, (N, B, T, E), which may be ``x``."""
        w_qkv, b_qkv, w, b, scale, shift = self.weights[:6]
        rows = x.reshape(len(x), -1, x.shape[-1])  # (N, B * T, E)
        seen = self._normed(rows, scale, shift) if self.norm_first else rows
        q, k, v = _heads(seen.view(x.shape), w_qkv, b_qkv, self.num_heads)
        del seen
        y = _attend(q, k, v, blocked).reshape(rows.shape)
        del q, k, v  # the largest tensor of the layer
        torch.add(rows, b.unsqueeze(1), out=out.view(rows.shape)).baddbmm_(y, w.mT)

    def feed_forward(self, x: Tensor) -> None:
        """Add to ``x``, (N, B, T, E), what the two linear layers make of it."""
        scale1, shift1, scale2, shift2, w1, b1, w2, b2 = self.weights[4:]
        rows = x.view(len(x), -1, x.shape[-1])
        if self.norm_first:
            y = self._normed(rows, scale2, shift2)
        else:
            y = self._normed(rows, scale1, shift1, rows)
        hidden = torch.baddbmm(b1.unsqueeze(1), y, w1.mT)
        del y
        hidden = torch.ops.aten.gelu_(hidden) if self.use_gelu else hidden.relu_()
        rows.add_(b2.unsqueeze(1)).baddbmm_(hidden, w2.mT)
        del hidden
        if not self.norm_first:
            self._normed(rows, scale2, shift2, rows)

    def _normed(
        self, rows: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None = None
    ) -> Tensor:
        y = F.layer_norm(rows, rows.shape[-1:], eps=self.eps)
        out = y if out is None else out
        return torch.addcmul(shift.unsqueeze(1), y, scale.unsqueeze(1), out=out)


def _encode(layer: _Layer, x: Tensor, blocked: Tensor | None, out: Tensor) -> None:
    """Write one layer of (N, B, T, E) into ``out``, in hardly more memory than one by one."""
    n = len(x)
    at_once = [n, n]
    if 3 * x.nbytes > _SMALL and x.device.type == "cpu":
        inner = layer.weights[8].shape[1] / x.shape[-1] + layer.norm_first
        at_once = [-(-n // math.ceil(need / _ROOM)) for need in (4, inner)]
    for part, of_x, of_y, of_mask in _parts(at_once[0], layer, x, out, blocked):
        part.attend(of_x, of_mask, of_y)
    for part, _, of_y, _ in _parts(at_once[1], layer, x, out, None):
        part.feed_forward(of_y)


def _parts(
    size: int, layer: _Layer, x: Tensor, y: Tensor, blocked: Tensor | None
) -> Iterator[tuple[_Layer, Tensor, Tensor, Tensor | None]]:
    """Layer, input, result and mask of so many members at a time."""
    n, batch = x.shape[:2]
    if size >= n:
        yield layer, x, y, blocked
        return
    for start in range(0, n, size):
        some = slice(start, start + size)
        part = layer._replace(weights=[tensor[some] for tensor in layer.weights])
        examples = slice(start * batch, (start + size) * batch)
        mine = blocked if blocked is None or len(blocked) == 1 else blocked[examples]
        yield part, x[some], y[some], mine


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
