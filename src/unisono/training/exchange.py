"""The rows of members, brought from the rank that holds each to all that have it at home."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from unisono.collectives import rows_of_each

_MESSAGE: Final = 32 << 20  # bytes; few messages, and little memory beside what is sent


@torch.no_grad()
def gather_members(
    tensors: Sequence[Tensor], held: Sequence[Sequence[int]], own: int, group: ProcessGroup
) -> None:
    """Write the rows that each rank holds to the tensors of all ranks, in place and bit by bit.

    Args:
        tensors: The rows of all members.
        held: For each rank the members whose rows are up to date there.
        own: The place of this rank.
        group: The ranks.

    Shape:
        - tensors: (N, *)
    """
    counts = [len(members) for members in held]
    for few in _messages(tensors, max(counts)):
        here = _index(held[own], few[0])
        sent = torch.cat([_bytes(tensor.detach().index_select(0, here)) for tensor in few], dim=1)
        found = rows_of_each(sent, counts, group)
        sizes = [_row_size(tensor) for tensor in few]
        for rank, (members, rows) in enumerate(zip(held, found, strict=True)):
            if rank == own:
                continue
            there = _index(members, few[0])
            for tensor, part in zip(few, torch.split(rows, sizes, dim=1), strict=True):
                # A copy, even of what is contiguous: a part may begin where no number of this
                # dtype may.
                values = part.clone(memory_format=torch.contiguous_format).view(tensor.dtype)
                values = values.reshape(len(members), *tensor.shape[1:])
                tensor.detach().index_copy_(0, there, values)


def _messages(tensors: Sequence[Tensor], num_rows: int) -> Iterator[list[Tensor]]:
    """The tensors in lists that are sent at once, each on one device; on all ranks the same."""
    kept = list(filter(_row_size, tensors))
    for device in dict.fromkeys(tensor.device for tensor in kept):
        few: list[Tensor] = []
        size = 0
        for tensor in (tensor for tensor in kept if tensor.device == device):
            if few and size + _row_size(tensor) * num_rows > _MESSAGE:
                yield few
                few, size = [], 0
            few.append(tensor)
            size += _row_size(tensor) * num_rows
        yield few


def _bytes(rows: Tensor) -> Tensor:
    """(n, *) -> (n, bytes of a row); as bytes, since a backend doesn't send every dtype."""
    return rows.contiguous().view(torch.uint8).reshape(len(rows), _row_size(rows))


def _row_size(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _index(members: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(members), dtype=torch.int64, device=like.device)
