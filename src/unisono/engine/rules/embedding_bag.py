"""``aten::embedding_bag``: the bags of all members from their tables, one below the other."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import for_each_member, members_first, unfolded

_MAX = 2


def embedding_bag(
    n: int,
    weight: Operand,
    indices: Operand,
    offsets: Operand,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Operand | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> list[Operand | None] | None:
    """``y[i][b] = reduce(weight[i][indices[i][offsets[i][b] : offsets[i][b + 1]]])``.

    Row r of member i is row ``i * V + r`` of the (N * V, D) table, which is a view, and its bags
    begin ``i * L`` further on. An index that doesn't count is another row in each table, so
    ``padding_idx`` is left to the members one by one. The gradient is dense, as in `embedding`.
    """
    has_padding = padding_idx is not None and padding_idx >= 0
    if include_last_offset or scale_grad_by_freq or has_padding:
        return None
    if weight[1] is None and per_sample_weights is None:
        return None
    tables, ids, starts = (for_each_member(x, n) for x in (weight, indices, offsets))
    if ids.dim() != 2 or starts.numel() == 0 or ids.numel() == 0:
        return None
    rows_of_table, length, num_bags = tables.shape[1], ids.shape[1], starts.shape[1]
    member = torch.arange(n, device=ids.device, dtype=ids.dtype).unsqueeze(1)
    rows = (ids + member * rows_of_table).flatten()
    begins = (starts + member * length).flatten()
    scales = None
    if per_sample_weights is not None:
        scales = for_each_member(per_sample_weights, n).flatten()
    table = tables.flatten(0, 1)  # (N * V, D)
    y, bag_of, size, largest = torch.embedding_bag(
        table, rows, begins, False, mode, False, scales, False
    )
    own = [(unfolded(y, 0, n), 0), _own(bag_of, n, member * num_bags), _own(size, n, None)]
    return [*own, _own(largest, n, member.unsqueeze(-1) * rows_of_table if mode == _MAX else None)]


def bags_of_one_length(n: int, weight: Operand, indices: Operand, mode: str) -> Operand | None:
    """``y[i][b] = reduce(weight[i][indices[i][b]])``; indices: (N, B, L) -> (N, B, D)."""
    is_shared = indices[1] is None
    ids = members_first(indices)  # (N, B, L), or (B, L) for all members
    if weight[1] is None or ids.dim() != 3 - is_shared or ids.numel() == 0:
        return None
    tables = members_first(weight)
    end = n * tables.shape[1]
    first_rows = torch.arange(0, end, tables.shape[1], device=ids.device, dtype=ids.dtype)
    rows = (ids + first_rows.view(n, 1, 1)).view(-1, ids.shape[-1])  # (N * B, L)
    y = F.embedding_bag(rows, tables.flatten(0, 1), mode=mode)
    return y.view(n, -1, y.shape[1]), 0


def _own(value: Tensor, n: int, first: Tensor | None) -> Operand:
    """What torch's own backward needs, counted from the start of each member."""
    if value.numel() == 0:
        return value, None
    value = unfolded(value, 0, n)
    return (value if first is None else (value - first).clamp_(min=0)), 0  # 0 for an empty bag
