"""Linear layers, convolutions, norms, embeddings and Transformer layers as steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from unisono.engine.axis import Operand, hooks_of, parameters_of
from unisono.engine.rules.conv import conv
from unisono.engine.rules.embedding import embedding
from unisono.engine.rules.embedding_bag import bags_of_one_length
from unisono.engine.rules.layer_norm import layer_norm
from unisono.engine.rules.linear import linear
from unisono.engine.rules.native_attention import encoder_layer
from unisono.engine.rules.norm import batch_norm
from unisono.engine.steps.step import Look, Step, parameter_of

CONVS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _linear(module: nn.Module) -> Step | None:
    own: Any = parameters_of(module)
    if not {"weight", "bias"} <= own.keys():  # computed by a hook or a parametrization
        return None

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        return linear(n, x, look(own["weight"]), parameter_of(own, "bias", look))

    return Step(module, run, is_product=True)


def _conv(module: Any) -> Step | None:
    own: Any = parameters_of(module)
    if not {"weight", "bias"} <= own.keys() or module.padding_mode != "zeros":
        return None

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        options = (module.stride, module.padding, module.dilation, module.groups)
        return conv(n, x, look(own["weight"]), parameter_of(own, "bias", look), *options)

    return Step(module, run)


def _batch_norm(dims: int) -> Callable[[Any], Step | None]:
    def make(module: Any) -> Step | None:
        own: Any = parameters_of(module)

        def run(n: int, x: Operand, look: Look) -> Operand | None:
            mean, var = module.running_mean, module.running_var
            is_batched = x[0].dim() - (x[1] is not None) == dims + 2
            if module.training or mean is None or var is None or not is_batched:
                return None
            weight, bias = (parameter_of(own, name, look) for name in ("weight", "bias"))
            statistics = look(mean), look(var)
            cudnn = torch.backends.cudnn.enabled
            return batch_norm(n, x, weight, bias, *statistics, False, 0.0, module.eps, cudnn)

        return Step(module, run) if {"weight", "bias"} <= own.keys() else None

    return make


def _layer_norm(module: Any) -> Step | None:
    own: Any = parameters_of(module)
    if not {"weight", "bias"} <= own.keys():
        return None

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        weight, bias = (parameter_of(own, name, look) for name in ("weight", "bias"))
        return layer_norm(n, x, module.normalized_shape, weight, bias, module.eps)

    return Step(module, run)


def _embedding(module: Any) -> Step | None:
    own: Any = parameters_of(module)
    if "weight" not in own or module.max_norm is not None:
        return None

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        padding = -1 if module.padding_idx is None else module.padding_idx
        options = (padding, module.scale_grad_by_freq, module.sparse)
        return embedding(n, look(own["weight"]), x, *options)

    return Step(module, run)


def _embedding_bag(module: Any) -> Step | None:
    own: Any = parameters_of(module)
    plain = module.max_norm is None and module.padding_idx is None
    if "weight" not in own or not plain or module.scale_grad_by_freq:
        return None

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        return bags_of_one_length(n, look(own["weight"]), x, module.mode)

    return Step(module, run)


def _encoder_layer(module: Any) -> Step | None:
    """Without masks and gradients; else the layer itself runs."""
    attention = module.self_attn
    out, norms = attention.out_proj, (module.norm1, module.norm2)
    linears = (module.linear1, module.linear2)
    is_plain = (
        type(attention) is nn.MultiheadAttention
        and type(out) is nn.modules.linear.NonDynamicallyQuantizableLinear
        and all(type(linear) is nn.Linear for linear in linears)
        and all(type(norm) is nn.LayerNorm for norm in norms)
        and not any("forward" in vars(each) or any(hooks_of(each)) for each in module.modules())
        and attention.batch_first
        and attention._qkv_same_embed_dim
        and attention.num_heads % 2 == 0
        and module.activation_relu_or_gelu
        and module.norm1.eps == module.norm2.eps
    )
    homes: list[Any] = [(parameters_of(attention), "in_proj_")]
    homes += [(parameters_of(part), "") for part in (out, *norms, *linears)]
    names = [(own, prefix + kind) for own, prefix in homes for kind in ("weight", "bias")]
    if not is_plain or any(own.get(name) is None for own, name in names):
        return None
    sizes: Any = (attention.embed_dim, attention.num_heads)
    options = (module.activation_relu_or_gelu == 2, module.norm_first, module.norm1.eps)

    def run(n: int, x: Operand, look: Look, *, overwrites: bool = False) -> Operand | None:
        if torch.is_grad_enabled() or module.training:
            return None
        if not torch.backends.mha.get_fastpath_enabled():
            return None
        weights: Any = [look(own[name]) for own, name in names]
        layer: Callable[..., Operand | None] = encoder_layer
        return layer(n, x, *sizes, *weights[:4], *options, *weights[4:], overwrites=overwrites)

    return Step(module, run, overwriting=partial(run, overwrites=True))


LAYERS: Final[Mapping[type[nn.Module], Callable[[Any], Step | None]]] = {
    nn.Linear: _linear,
    **dict.fromkeys(CONVS, _conv),
    nn.BatchNorm2d: _batch_norm(2),
    nn.BatchNorm3d: _batch_norm(3),
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding_bag,
    nn.TransformerEncoderLayer: _encoder_layer,
}
