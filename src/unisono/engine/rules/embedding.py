"""``aten::embedding``: one lookup in the tables of all members, one below the other."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from unisono.engine.axis import Operand
from unisono.engine.rules.layout import for_each_member, members_first


def embedding(
    n: int,
    weight: Operand,
    indices: Operand,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Operand | None:
    """``y[i] = weight[i][indices[i]]``; indices: (N, *) -> (N, *, D).

    Row r of member i is row ``i * V + r`` of the (N * V, D) table, which is a view. Torch's own
    rule copies the table for shared indices, and for indices per member it forgets
    ``padding_idx``, so that the padding row gets a gradient. The gradient is dense also where
    ``sparse`` asks for another layout, which the view of the tables couldn't take back.
    """
    if weight[1] is None:
        return None
    tables = members_first(weight)  # (N, V, D)
    ids = for_each_member(indices, n)
    first_rows = torch.arange(n, device=ids.device, dtype=ids.dtype) * tables.shape[1]
    rows = ids + first_rows.view(n, *[1] * (ids.dim() - 1))
    y = F.embedding(rows, tables.flatten(0, 1), scale_grad_by_freq=scale_grad_by_freq)
    if padding_idx >= 0 and y.requires_grad:
        y = torch.where((ids == padding_idx).unsqueeze(-1), y.detach(), y)
    return y, 0
