"""Activations, and layers that do nothing but change a shape, as steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import members_first
from unisono.engine.steps.step import Activation, Look, Step

_aten: Final = torch.ops.aten


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


ELEMENTWISE: Final[Mapping[type[nn.Module], Callable[[Any], Step | None]]] = {
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
