"""``nn.MultiheadAttention`` of a sequence to itself where gradients may be needed.

Written out op by op it takes queries, keys and values from one tensor by three selects, and the
gradient of each is a tensor of full size that is nothing but zeros in the other two.
"""

from __future__ import annotations

from torch.nn import functional as F

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import for_each_member, members_first
from unisono.engine.rules.linear import linear


def self_attention(
    n: int,
    num_heads: int,
    batch_first: bool,
    x: Operand,
    qkv_weight: Operand,
    qkv_bias: Operand | None,
    weight: Operand,
    bias: Operand | None,
) -> Operand | None:
    """``q, k, v = x[i] @ qkv_weight[i].T + qkv_bias[i]``, attention, and a linear layer behind it.

    One product for the queries, keys and values, one attention over N * B examples, one product.
    No masks, no dropout, no weights of the attention.

    Shape:
        - x, returns: (N, B, T, E), or (N, T, B, E) without ``batch_first``
    """
    operands = (x, qkv_weight, qkv_bias, weight, bias)
    if all(operand is None or operand[1] is None for operand in operands):
        return None
    if x[0].dim() - (x[1] is not None) != 3:
        return None
    given = for_each_member(x, n)
    if given.shape[-1] != members_first(qkv_weight).shape[-1]:
        return None  # the class says what is wrong
    examples = given if batch_first else given.transpose(1, 2)
    qkv = linear(n, (examples, 0), qkv_weight, qkv_bias)
    if qkv is None:
        return None
    _, batch, length, width = examples.shape
    heads = qkv[0].reshape(n * batch, length, 3, num_heads, width // num_heads)
    q, k, v = heads.permute(2, 0, 3, 1, 4).unbind()  # (N * B, H, T, E / H)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    result = linear(n, (y.reshape(examples.shape), 0), weight, bias)
    if result is None or batch_first:
        return result
    return result[0].transpose(1, 2), 0
