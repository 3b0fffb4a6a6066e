"""Pooling as steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from unisono.engine.axis import Operand
from unisono.engine.rules.spatial import spatial
from unisono.engine.steps.step import Look, Step

_AVERAGE: Final = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_MAX: Final = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
MAX_POOLS: Final = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
WINDOW_POOLS: Final = (*MAX_POOLS, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)


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


POOLS: Final[Mapping[type[nn.Module], Callable[[Any], Step | None]]] = {
    nn.MaxPool1d: _pool("max_pool1d", *_MAX),
    nn.MaxPool2d: _pool("max_pool2d", *_MAX),
    nn.MaxPool3d: _pool("max_pool3d", *_MAX),
    nn.AvgPool1d: _pool("avg_pool1d", *_AVERAGE),
    nn.AvgPool2d: _pool("avg_pool2d", *_AVERAGE, "divisor_override"),
    nn.AvgPool3d: _pool("avg_pool3d", *_AVERAGE, "divisor_override"),
    nn.AdaptiveAvgPool1d: _adaptive_pool(1),
    nn.AdaptiveAvgPool2d: _adaptive_pool(2),
    nn.AdaptiveAvgPool3d: _adaptive_pool(3),
}
