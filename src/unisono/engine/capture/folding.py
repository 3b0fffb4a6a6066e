"""Fold a batch norm by running statistics into the convolutions before it.

``norm(conv(x, w, b)) = conv(x, w * s, b * s + shift)`` with ``s = weight / sqrt(var + eps)`` and
``shift = bias - mean * s``. The changed filters are computed anew in each replay, so weights and
statistics stay live; that costs a pass over the filters and saves one over the results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from unisono.engine.capture.trace import Op, Ref, Trace, map_args
from unisono.engine.steps import pays_to_fold

_aten: Final = torch.ops.aten
_FLOATS: Final = (torch.float32, torch.float64)
_VIEWS: Final = (_aten.split_with_sizes.default, _aten.view.default)
_PRODUCTS: Final = (_aten.bmm.default, _aten.baddbmm.default)
# What brings the results of a product into the order that a norm takes.
_MOVES: Final = (
    _aten.clone.default,
    _aten.permute.default,
    _aten.view.default,
    _aten._unsafe_view.default,
)


def with_folded_norms(trace: Trace, ops: Sequence[Op]) -> list[Op]:
    """The ops without such norms.

    Where members are convolved one by one, their results stand side by side, joined by ``cat``.
    Where filters see one position at a time, the convolutions are a matrix product.
    """
    made = {ref: k for k, op in enumerate(ops) for ref in op.results if not op.written}
    readers = Counter(storage for op in ops for storage in _storages(trace, op.reads))
    readers.update(_storages(trace, trace.outputs))
    found: list[list[Op]] = [[op] for op in ops]
    for k, norm in enumerate(ops):
        if norm.target is not _aten.native_batch_norm.default:
            continue
        last = made.get(norm.args[0])
        if last is None:  # what the caller has passed
            continue
        is_cat = ops[last].target is _aten.cat.default and ops[last].args[1:] == (1,)
        moves = _moves(ops, made, last)
        if is_cat:
            convs = [made.get(ref, -1) for ref in ops[last].args[0]]
        else:
            convs = [last if not moves else made.get(ops[moves[0]].args[0], -1)]
        if min(convs) < 0 or len(set(convs)) < len(convs):  # an input, or one result twice
            continue
        if not _is_known_to_norm_only(trace, ops, readers, [*convs, *moves, last], k):
            continue
        if moves:
            folded = _folded_product(trace, ops[convs[0]], [ops[j] for j in moves], norm)
        else:
            folded = _folded(trace, [ops[j] for j in convs], norm)
        if folded is None:
            continue
        before, changed = folded
        for j, op in zip(convs, changed, strict=True):
            found[j] = [op]
        found[last] = [replace(found[last][-1], result=norm.result[0])]
        found[min(convs)] = [*before, *found[min(convs)]]
        found[k] = []
    return [op for part in found for op in part]


def _is_known_to_norm_only(
    trace: Trace, ops: Sequence[Op], readers: Mapping[int, int], made_by: Sequence[int], norm: int
) -> bool:
    """Whether nobody else reads these results, and the norm may read its tensors earlier."""
    made = [ref for k in set(made_by) for ref in ops[k].results]
    between = _storages(trace, made)
    # A view and what it shows have one storage, which is read once more for each.
    reads = Counter(trace.values[ref].storage for ref in made)
    aside = _storages(trace, ops[norm].results[1:])
    written = _storages(trace, [ref for op in ops[min(made_by) : norm] for ref in op.written])
    return (
        all(readers[storage] == reads[storage] for storage in between)
        and not any(readers[storage] for storage in aside)
        and written.isdisjoint(_storages(trace, ops[norm].reads))
    )


def _storages(trace: Trace, refs: Iterable[Ref]) -> set[int]:
    return {trace.values[ref].storage for ref in refs}


def _moves(ops: Sequence[Op], made: Mapping[Ref, int], last: int) -> list[int]:
    """The ops, in order, that bring a product's results to where ``last`` leaves them."""
    found: list[int] = []
    place: int | None = last
    while place is not None and ops[place].target in _MOVES:
        found.insert(0, place)
        place = made.get(ops[place].args[0])
    return found if place is not None and ops[place].target in _PRODUCTS else []


def _folded_product(
    trace: Trace, product: Op, moves: Sequence[Op], norm: Op
) -> tuple[list[Op], list[Op]] | None:
    """The same for a product ``filters @ columns`` (+ bias) with a channel in each row."""
    between, _, _, mean, var, training, _, _ = norm.args
    if training or mean is None or var is None:
        return None
    if trace.values[between].layout != trace.values[norm.results[0]].layout:
        return None
    *bias, filters, columns = product.args
    w, y = trace.tensor(filters), trace.tensor(product.result)
    if w.dtype not in _FLOATS or product.kwargs or not pays_to_fold(y.numel(), w.numel()):
        return None
    rows = torch.arange(len(w) * w.shape[1], device=w.device)
    where = rows.view(len(w), -1, 1).expand(y.shape)
    for op in moves:
        where = op.target(where, *op.args[1:], **op.kwargs)
    if not torch.equal(where, rows.view(-1, *[1] * (where.dim() - 2)).expand(where.shape)):
        return None  # the norm's channels are others
    made = _Made(trace)
    scale, shift = (made(_aten.view.default, ref, [*w.shape[:2], 1]) for ref in _affine(made, norm))
    own = made(_aten.addcmul.default, shift, bias[0], scale) if bias else shift
    scaled = made(_aten.mul.Tensor, filters, scale)
    changed = Op(_aten.baddbmm.default, (own, scaled, columns), {}, product.result)
    return made.ops, [changed]


def _affine(made: _Made, norm: Op) -> tuple[Ref, Ref]:
    """What the norm multiplies by, and what it adds."""
    _, weight, bias, mean, var, _, _, eps = norm.args
    scale = made(_aten.rsqrt.default, made(_aten.add.Scalar, var, eps))
    if weight is not None:
        scale = made(_aten.mul.Tensor, scale, weight)
    shift = made(_aten.mul.Tensor, mean, scale)
    shift = made(_aten.neg.default, shift) if bias is None else made(_aten.sub.Tensor, bias, shift)
    return scale, shift


def _folded(trace: Trace, convs: Sequence[Op], norm: Op) -> tuple[list[Op], list[Op]] | None:
    """What is to be computed before, and the changed convolutions; None where it doesn't pay."""
    if any(conv.target is not _aten.convolution.default for conv in convs):
        return None
    between, _, _, mean, var, training, _, _ = norm.args
    if training or mean is None or var is None:
        return None
    if trace.values[between].layout != trace.values[norm.results[0]].layout:
        return None
    filters = [trace.tensor(conv.args[1]) for conv in convs]
    results = [trace.tensor(conv.result) for conv in convs]
    if any(w.dtype not in _FLOATS for w in filters) or any(conv.args[6] for conv in convs):
        return None  # rounded weights, or transposed convolutions
    if not all(pays_to_fold(y.numel(), w.numel()) for y, w in zip(results, filters, strict=True)):
        return None
    made = _Made(trace)
    scale, shift = _affine(made, norm)
    scales, shifts = [scale], [shift]
    if len(convs) > 1:
        sizes = [len(w) for w in filters]
        scales, shifts = (
            made(_aten.split_with_sizes.default, ref, sizes) for ref in (scale, shift)
        )
    changed = []
    for conv, s, t in zip(convs, scales, shifts, strict=True):
        x, w, b, *options = conv.args
        shape = [-1, *[1] * (trace.tensor(w).dim() - 1)]
        scaled = made(_aten.mul.Tensor, w, made(_aten.view.default, s, shape))
        if trace.tensor(scaled).stride() != trace.tensor(w).stride():
            return None  # another memory format, and so another kernel
        own = t if b is None else made(_aten.addcmul.default, t, b, s)
        changed.append(Op(conv.target, (x, scaled, own, *options), {}, conv.result))
    return made.ops, changed


class _Made:
    """Adds ops to a program, with the values that they have in the recording."""

    def __init__(self, trace: Trace) -> None:
        self.ops: list[Op] = []
        self._trace = trace

    def __call__(self, target: Any, *args: Any) -> Any:
        """One more op; returns what stands for its result."""
        values = self._trace.values
        found = target(*[self._trace.tensor(arg) if isinstance(arg, Ref) else arg for arg in args])
        storage = values[args[0]].storage
        if target not in _VIEWS:
            storage = len(self._trace.origins)
            self._trace.origins.append("op")
        result = map_args(lambda tensor: self._trace.add(tensor, storage), found)
        self.ops.append(Op(target, args, {}, result))
        return result
