"""Convolutions of the members one after another, with one gradient for all their weights.

Autograd would join N gradients in a copy. Here each is written where it belongs. Where a large
weight sees few positions, as in the deep layers of a network, its gradient is computed there as a
matrix product: oneDNN brings weights into an order of its own and back, which takes longer than
the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono.engine.axis import has_tangents, is_observed, is_transformed
from unisono.engine.joining import home_of
from unisono.engine.rules.layout import batch_lies_outside

# Measured on 2 AVX-512 cores, with 4 and 8 members.
_SMALLEST: Final = 1 << 20  # bytes of all weights whose gradients are worth a way of their own
_FEW: Final = 64  # positions of a member's minibatch for which a product is faster
_HEAVY: Final = 16 << 20  # bytes of one member's weight from which on it is in the forward, too


class Geometry(NamedTuple):
    """The arguments of a convolution without groups, with an entry for each spatial axis."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    is_transposed: bool = False
    output_padding: tuple[int, ...] = (0,)


def along_axes(option: Sequence[int], spatial: int) -> tuple[int, ...]:
    """An entry for each spatial axis; one alone is meant for all."""
    return tuple(option) * (spatial if len(option) == 1 else 1)


def separate(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor | None:
    """Convolve ``x[i]`` with ``weight[i]`` and add ``bias[i]``, one member after another.

    Returns:
        None where the convolutions had better be left to autograd.

    Shape:
        - x: (N, B, C, *)
        - weight: (N, O, C, *), transposed (N, C, O, *)
        - bias: (N, O)
        - returns: (B, N, O, *)
    """
    if (
        weight.device.type != "cpu"
        or weight.nbytes < _SMALLEST
        or not weight.is_contiguous()
        or weight.dtype not in (torch.float32, torch.float64)
        or weight.dtype != x.dtype
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch.compiler.is_exporting()  # the size of a batch may not be fixed
        or is_transformed()
        or has_tangents()
    ):
        return None
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        if is_observed():
            return None
        found: Tensor = _Separate.apply(x, weight, bias, geometry)  # type: ignore[no-untyped-call]
        return found
    return _as_product(x, weight, bias, geometry) if _is_heavy(x, weight, geometry) else None


class _Separate(torch.autograd.Function):
    """The convolutions, and a backward that joins the gradients of the weights as they come."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.home = geometry, home_of(weight)
        if _is_heavy(x, weight, geometry):
            return _as_product(x, weight, bias, geometry)
        biases = [None] * len(weight) if bias is None else bias.unbind()
        columns = zip(x.unbind(), weight.unbind(), biases, strict=True)
        return torch.stack([_convolve(*column, geometry) for column in columns], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, geometry, home = gradients[0], ctx.geometry, ctx.home
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        of_x, of_weight, of_bias = wanted
        rows = list(zip(gradient.unbind(1), x.unbind(), weight.unbind(), strict=True))
        if torch.is_grad_enabled():  # these gradients will themselves be differentiated
            parts = zip(*(_backward(*row, geometry, wanted) for row in rows), strict=True)
            found = [torch.stack(p) if w else None for p, w in zip(parts, wanted, strict=True)]
            return (*found, None)
        room = home.room_for(weight) if of_weight else None
        at_once = room is not None and _has_few_positions(x, gradient, geometry)
        if room is not None and at_once:
            _write_products(room, x, gradient, geometry)
        by_member = (of_x, of_weight and not at_once, False)
        at_x: list[Tensor] = []
        for i, row in enumerate(rows if True in by_member else ()):
            own_x, own_weight, _ = _backward(*row, geometry, by_member)
            if own_x is not None:
                at_x.append(own_x)
            if room is not None and own_weight is not None:
                room[i].copy_(own_weight)
        return (
            _stacked_like(x, at_x) if of_x else None,
            None if room is None else home.keep(room),
            gradient.sum([0, *range(3, gradient.dim())]) if of_bias else None,
            None,
        )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """One member's convolution."""
    stride, padding, dilation, is_transposed, output_padding = geometry
    options = (stride, padding, dilation, is_transposed, output_padding, 1)
    found: Tensor = torch.ops.aten.convolution(x, weight, bias, *options)
    return found


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    """One member's gradients of input, weight and bias; None for those that aren't wanted."""
    stride, padding, dilation, is_transposed, output_padding = geometry
    options = (stride, padding, dilation, is_transposed, output_padding, 1)
    found: Sequence[Tensor | None] = torch.ops.aten.convolution_backward(
        gradient, x, weight, [gradient.shape[1]], *options, wanted
    )
    return found


def _stacked_like(x: Tensor, rows: list[Tensor]) -> Tensor:
    return torch.stack(rows, 1).transpose(0, 1) if batch_lies_outside((x, 0)) else torch.stack(rows)


# Convolutions as matrix products ------------------------------------------------------------------


def _is_heavy(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether the convolution itself is faster as a product."""
    if weight[0].nbytes < _HEAVY or geometry.is_transposed:
        return False
    return x.shape[1] * math.prod(_positions(x, weight, geometry)) <= _FEW


def _has_few_positions(x: Tensor, gradient: Tensor, geometry: Geometry) -> bool:
    """Whether the gradient of the weights is faster as a product."""
    seen = x if geometry.is_transposed else gradient
    return x.shape[1] * math.prod(seen.shape[3:]) <= _FEW


def _positions(x: Tensor, weight: Tensor, geometry: Geometry) -> list[int]:
    """How often the filters fit along each spatial axis."""
    sizes = zip(
        x.shape[3:],
        weight.shape[3:],
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        strict=True,
    )
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes]


def _as_product(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """``weight @ windows(x) + bias``; (B, N, O, *)."""
    positions = _positions(x, weight, geometry)
    columns = _windows(x, weight.shape[3:], positions, geometry)
    filters = weight.flatten(2)  # (N, O, C * k)
    if bias is None:
        y = torch.bmm(filters, columns)
    else:
        y = torch.baddbmm(bias.unsqueeze(2), filters, columns)
    return y.reshape(*y.shape[:2], x.shape[1], *positions).movedim(2, 0).contiguous()


def _write_products(room: Tensor, x: Tensor, gradient: Tensor, geometry: Geometry) -> None:
    """Write the gradient of the weights: of one side the windows, of the other the positions."""
    image, points = x, gradient.transpose(0, 1)
    if geometry.is_transposed:
        image, points = points, image
    columns = _windows(image, room.shape[3:], points.shape[3:], geometry)
    rows = points.transpose(1, 2).flatten(2)  # (N, O, B * positions)
    torch.bmm(rows, columns.transpose(1, 2), out=room.flatten(2))


def _windows(
    image: Tensor, kernel: Sequence[int], positions: Sequence[int], geometry: Geometry
) -> Tensor:
    """What the filters see at each position.

    Shape:
        - image: (N, B, C, *)
        - returns: (N, C * k, B * positions)
    """
    sides = [side for p in reversed(geometry.padding) for side in (p, p)]
    # A filter that doesn't fit in evenly leaves a margin out, or has one in a transposed one.
    padded = F.pad(image, sides) if any(sides) else image
    windows = padded
    for axis, (size, count) in enumerate(zip(kernel, positions, strict=True), start=3):
        step, apart = geometry.stride[axis - 3], geometry.dilation[axis - 3]
        windows = windows.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
        windows = windows.narrow(axis, 0, count)
    spatial = len(kernel)  # (N, B, C, positions, k), every step relative to what was there
    order = (0, 2, *range(3 + spatial, 3 + 2 * spatial), 1, *range(3, 3 + spatial))
    windows = windows.permute(order)
    return windows.flatten(2 + spatial).flatten(1, 1 + spatial)
