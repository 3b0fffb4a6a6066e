"""Torch's own layers as steps on plain tensors, without the way through module and dispatcher.

A step runs the rule of its layer at once. Between two steps nobody sees the result, so what
follows may write to where it reads from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unisono.engine.axis import Operand, hooks_of, is_observed, parameters_of
from unisono.engine.rules.conv import conv
from unisono.engine.rules.embedding import embedding
from unisono.engine.rules.embedding_bag import bags_of_one_length
from unisono.engine.rules.layer_norm import layer_norm
from unisono.engine.rules.layout import members_first
from unisono.engine.rules.linear import linear
from unisono.engine.rules.native_attention import encoder_layer
from unisono.engine.rules.norm import batch_norm
from unisono.engine.rules.spatial import spatial

Look = Callable[[Tensor], Operand]
"""What a tensor of the layer is for all members."""

Run = Callable[[int, Operand, Look], Operand | None]
"""``run(n, x, look)``: what the layer makes of ``x``; None where the layer itself has to run."""


class Activation(NamedTuple):
    """What a layer does to each element."""

    in_place: Callable[[Tensor], Tensor]
    out_of_place: Callable[[Tensor], Tensor]
    keeps_result: bool  # whether its derivative is a function of the result, not of the input
    overwrites: bool  # whether the user asked for ``inplace=True``


class Step(NamedTuple):
    """One layer.

    Attributes:
        module: The layer.
        run: What it does, None if it is an activation.
        activation: What it does to each element, None otherwise.
        is_view: Whether its result may lie in the memory of its input.
        is_product: Whether its result is a product of matrices, which backward doesn't need.
        with_next: What it and the next layer do in one, where there are no gradients.
    """

    module: nn.Module
    run: Run | None
    activation: Activation | None = None
    is_view: bool = False
    is_product: bool = False
    with_next: Run | None = None


def joined(steps: Sequence[Step]) -> list[Step]:
    """The steps of a chain, some of which know what they do better together with the next one."""
    found = list(steps)
    for k, (step, behind) in enumerate(itertools.pairwise(steps)):
        if type(step.module) in _CONVS and type(behind.module) in (nn.BatchNorm2d, nn.BatchNorm3d):
            found[k] = step._replace(with_next=_conv_and_norm(step.module, behind.module))
        elif type(step.module) is nn.ReLU and type(behind.module) in _MAX_POOLS:
            found[k] = step._replace(with_next=_pool_and_relu(behind))
    return found


def step_of(module: nn.Module) -> Step | None:
    """The step of a layer; None if it isn't one of torch's own classes, or somebody looks at it."""
    make = _STEPS.get(type(module))
    if make is None or "forward" in vars(module) or any(hooks_of(module)):
        return None
    return make(module)


def _parameter(own: Mapping[str, Tensor | None], name: str, look: Look) -> Operand | None:
    value = own[name]
    return None if value is None else look(value)


def _linear(module: nn.Module) -> Step | None:
    own: Any = parameters_of(module)
    if not {"weight", "bias"} <= own.keys():  # computed by a hook or a parametrization
        return None

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        return linear(n, x, look(own["weight"]), _parameter(own, "bias", look))

    return Step(module, run, is_product=True)


def _conv(module: Any) -> Step | None:
    own: Any = parameters_of(module)
    if not {"weight", "bias"} <= own.keys() or module.padding_mode != "zeros":
        return None

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        options = (module.stride, module.padding, module.dilation, module.groups)
        return conv(n, x, look(own["weight"]), _parameter(own, "bias", look), *options)

    return Step(module, run)


def _conv_and_norm(convolution: Any, norm: Any) -> Run:
    """Scale and shift of a norm by running statistics, in the filters and the bias.

    ``norm(conv(x, w, b)) = conv(x, w * s, b * s + shift)`` with ``s = weight / sqrt(var + eps)``.
    It pays where there are many results, and more than filters.
    """
    own: Any = parameters_of(convolution)
    of_norm: Any = parameters_of(norm)

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        if norm.training or norm.running_mean is None or norm.running_var is None:
            return None
        w, dim = look(own["weight"])
        spatial = w.dim() - 3
        if dim != 0 or w.dtype not in (torch.float32, torch.float64) or x[0].dtype != w.dtype:
            return None
        if x[0].dim() - (x[1] is not None) != spatial + 2 or is_observed():
            return None
        examples = x[0].numel() / x[0].shape[-spatial - 1] * (1 if x[1] is not None else n)
        results = examples / math.prod(convolution.stride) * w.shape[1]
        if results < max(_MANY, 4 * w.numel()):
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


def _batch_norm(dims: int) -> Callable[[Any], Step | None]:
    def make(module: Any) -> Step | None:
        own: Any = parameters_of(module)

        def run(n: int, x: Operand, look: Look) -> Operand | None:
            mean, var = module.running_mean, module.running_var
            is_batched = x[0].dim() - (x[1] is not None) == dims + 2
            if module.training or mean is None or var is None or not is_batched:
                return None
            weight, bias = (_parameter(own, name, look) for name in ("weight", "bias"))
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
        weight, bias = (_parameter(own, name, look) for name in ("weight", "bias"))
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

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        if torch.is_grad_enabled() or module.training:
            return None
        if not torch.backends.mha.get_fastpath_enabled():
            return None
        weights: Any = [look(own[name]) for own, name in names]
        layer: Callable[..., Operand | None] = encoder_layer
        return layer(n, x, *sizes, *weights[:4], *options, *weights[4:])

    return Step(module, run)


def _pool(op: str, *names: str) -> Callable[[Any], Step | None]:
    rule = spatial(op)

    def make(module: Any) -> Step | None:
        def run(n: int, x: Operand, look: Look) -> Operand | None:
            if getattr(module, "return_indices", False):
                return None
            found = rule(n, x, *(getattr(module, name) for name in names))
            return None if isinstance(found, list) else found

        return Step(module, run)

    return make


def _pool_and_relu(pool: Step) -> Run:
    """``relu`` keeps the order, so its largest result is that of the largest, to the bit."""

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        found = None if pool.run is None else pool.run(n, x, look)
        return None if found is None else (torch.relu_(found[0]), found[1])

    return run


def _adaptive_pool(dims: int) -> Callable[[Any], Step | None]:
    rule = spatial(f"adaptive_avg_pool{dims}d")

    def make(module: Any) -> Step | None:
        def run(n: int, x: Operand, look: Look) -> Operand | None:
            size = module.output_size
            size = [size] * dims if isinstance(size, int) else list(size)
            if None in size:  # as large as the input
                return None
            found = rule(n, x, size)
            return None if isinstance(found, list) else found

        return Step(module, run)

    return make


def _flatten(module: Any) -> Step | None:
    def run(n: int, x: Operand, look: Look) -> Operand | None:
        value, dim = x
        if (module.start_dim, module.end_dim) != (1, -1) or value.dim() - (dim is not None) < 2:
            return None
        return (value.flatten(1), None) if dim is None else (members_first(x).flatten(2), 0)

    return Step(module, run, is_view=True)


def _nothing(module: Any) -> Step | None:
    """Identity, and dropout while it drops nothing."""
    is_dropout = not isinstance(module, nn.Identity)

    def run(n: int, x: Operand, look: Look) -> Operand | None:
        return None if is_dropout and module.training else x

    return Step(module, run, is_view=True)


def _activation(
    in_place: Callable[..., Tensor],
    out_of_place: Callable[..., Tensor],
    *names: str,
    keeps_result: bool = False,
) -> Callable[[Any], Step | None]:
    def make(module: Any) -> Step | None:
        def with_options(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
            if not names:
                return function
            return lambda x: function(x, *(getattr(module, name) for name in names))

        overwrites = getattr(module, "inplace", False)
        functions = with_options(in_place), with_options(out_of_place)
        return Step(module, None, Activation(*functions, keeps_result, overwrites))

    return make


_aten: Final = torch.ops.aten
_AVERAGE: Final = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_MAX: Final = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")

_MANY: Final = 1 << 18  # results of a convolution: below, changing the filters takes longer
_CONVS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_MAX_POOLS: Final = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_STEPS: Final[Mapping[type[nn.Module], Callable[[Any], Step | None]]] = {
    nn.Linear: _linear,
    **dict.fromkeys(_CONVS, _conv),
    nn.BatchNorm2d: _batch_norm(2),
    nn.BatchNorm3d: _batch_norm(3),
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding_bag,
    nn.TransformerEncoderLayer: _encoder_layer,
    nn.MaxPool1d: _pool("max_pool1d", *_MAX),
    nn.MaxPool2d: _pool("max_pool2d", *_MAX),
    nn.MaxPool3d: _pool("max_pool3d", *_MAX),
    nn.AvgPool1d: _pool("avg_pool1d", *_AVERAGE),
    nn.AvgPool2d: _pool("avg_pool2d", *_AVERAGE, "divisor_override"),
    nn.AvgPool3d: _pool("avg_pool3d", *_AVERAGE, "divisor_override"),
    nn.AdaptiveAvgPool1d: _adaptive_pool(1),
    nn.AdaptiveAvgPool2d: _adaptive_pool(2),
    nn.AdaptiveAvgPool3d: _adaptive_pool(3),
    nn.Flatten: _flatten,
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _nothing),
    nn.ReLU: _activation(torch.relu_, torch.relu, keeps_result=True),
    nn.Tanh: _activation(torch.tanh_, torch.tanh, keeps_result=True),
    nn.Sigmoid: _activation(torch.sigmoid_, torch.sigmoid, keeps_result=True),
    nn.GELU: _activation(
        lambda x, kind: _aten.gelu_(x, approximate=kind),
        lambda x, kind: F.gelu(x, approximate=kind),
        "approximate",
    ),
    nn.SiLU: _activation(_aten.silu_, F.silu),
    nn.Hardswish: _activation(_aten.hardswish_, F.hardswish),
    nn.Hardsigmoid: _activation(_aten.hardsigmoid_, F.hardsigmoid),
    nn.LeakyReLU: _activation(F.leaky_relu_, F.leaky_relu, "negative_slope"),
    nn.ELU: _activation(F.elu_, F.elu, "alpha"),
}
