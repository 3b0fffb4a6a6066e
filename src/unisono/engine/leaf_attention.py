"""Self-attention without detours, as `leaf.py` has it for other layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unisono.engine.axis import Operand, parameters_of
from unisono.engine.kernels import run_rule
from unisono.engine.rules.self_attention import self_attention


def is_plain_attention(module: nn.MultiheadAttention) -> bool:
    """Whether a module of torch's own class has one weight for queries, keys and values."""
    own, out = parameters_of(module), module.out_proj
    return (
        type(out) is nn.modules.linear.NonDynamicallyQuantizableLinear
        and {"in_proj_weight", "in_proj_bias"} <= own.keys()
        and own["in_proj_weight"] is not None
        and {"weight", "bias"} <= parameters_of(out).keys()
        and module.bias_k is None
        and not module.add_zero_attn
    )


class AttentionForward:
    """``forward`` of one ``nn.MultiheadAttention`` of a template."""

    __slots__ = ("_module", "_own", "_own_out")

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self._module = module
        self._own, self._own_out = parameters_of(module), parameters_of(module.out_proj)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention without masks and dropout by its rule, all else as the class does it."""
        module = self._module
        is_self = query is key is value and type(query) is Tensor
        is_simple = key_padding_mask is None and attn_mask is None and not need_weights
        is_native = not module.training and not torch.is_grad_enabled()
        draws = module.training and module.dropout > 0
        if is_self and is_simple and not (is_causal or is_native or draws):
            own, out = self._own, self._own_out
            weights = (own["in_proj_weight"], own["in_proj_bias"], out["weight"], out["bias"])
            return run_rule(self._rule, self._by_class, query, *weights), None
        masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return nn.MultiheadAttention.forward(module, query, key, value, *masks)

    def _rule(self, n: int, *operands: Any) -> Operand | None:
        return self_attention(n, self._module.num_heads, self._module.batch_first, *operands)

    def _by_class(self, x: Tensor, *_: Tensor | None) -> Tensor:
        y: Tensor = nn.MultiheadAttention.forward(self._module, x, x, x, need_weights=False)[0]
        return y
