"""Tensors of several processes as one: sums, maxima and rows of all, with gradients.

Every rank computes the same number from what these return, a loss for instance, and the gradient of
that one number is what reaches a rank's own part. So `all_sum` and `gather_rows` send nothing in
the backward pass; where their result is used with a rank's own part once more, `each_uses` sums the
gradients of these uses. (`torch.distributed.nn.functional` adds up the gradients of one loss per
rank instead, and is deprecated.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

MEMBER = "member"


def member_group(call: str, mesh: DeviceMesh | None) -> ProcessGroup | None:
    """The ranks that hold the other members; None without a mesh.

    Args:
        call: The function that the user called, for the message.
        mesh: A mesh with an axis ``"member"``.

    Raises:
        TypeError: If it is no mesh.
        ValueError: If it has no such axis.
    """
    if mesh is None:
        return None
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"{call}: mesh is a torch.distributed.DeviceMesh, got {type(mesh).__name__}; make one"
            f" by mesh = unisono.distributed.make_mesh()"
        )
    names = mesh.mesh_dim_names
    if names is None or MEMBER not in names:
        raise ValueError(
            f'{call}: the mesh has an axis "{MEMBER}", but its axes are {names}; name it by'
            f' mesh_dim_names=("{MEMBER}",)'
        )
    return mesh.get_group(MEMBER)


def all_sum(part: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over the ranks: ``sum_r part_r``, the same on every rank.

    Args:
        part: Of this rank; all have the same shape and dtype.
        group: The ranks.

    Shape:
        - part, returns: (*)
    """
    found: Tensor = _Sum.apply(part, group)  # type: ignore[no-untyped-call]
    return found


def each_uses(common: Tensor, group: ProcessGroup | None) -> Tensor:
    """Let a value that is equal on all ranks be used with each rank's own part.

    The gradient is the sum of those of all ranks; `all_sum` and `gather_rows`, whose result every
    rank uses in the same way, need no such thing.

    Shape:
        - common, returns: (*)
    """
    if group is None:
        return common
    found: Tensor = _EachUses.apply(common, group)  # type: ignore[no-untyped-call]
    return found


def all_max(part: Tensor, group: ProcessGroup) -> Tensor:
    """The largest of all ranks, element by element, without a gradient.

    Shape:
        - part, returns: (*)
    """
    found = part.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(found, dist.ReduceOp.MAX, group)
    return found


def broadcast_first(part: Tensor, group: ProcessGroup) -> Tensor:
    """What the first rank has, on every rank, without a gradient.

    Shape:
        - part, returns: (*)
    """
    found = part.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(found, group=group, group_src=0)
    return found


def gather_rows(rows: Tensor, group: ProcessGroup) -> Tensor:
    """The rows of all ranks, one behind the other in the order of the ranks.

    Ranks may have different numbers of rows; the shorter ones send rows of no meaning along.

    Args:
        rows: Of this rank; all ranks have the same shape but for the rows, and the same dtype.
        group: The ranks.

    Shape:
        - rows: (n, *)
        - returns: (N, *), with N the sum over the ranks
    """
    counts = rows_of_ranks(rows, group)
    found: Tensor = _Gather.apply(rows, counts, group)  # type: ignore[no-untyped-call]
    return found


def gather_values(rows: Tensor, group: ProcessGroup) -> Tensor:
    """What `gather_rows` gives, of any dtype, bit by bit and without a gradient.

    Shape:
        - rows: (n, *)
        - returns: (N, *), with N the sum over the ranks
    """
    own = rows.detach()
    size = own[:0].flatten(1).shape[1] if own.dim() > 1 else 1
    if not size:
        return own.new_empty(sum(rows_of_ranks(own, group)), *own.shape[1:])
    # As bytes, since a backend doesn't send every dtype.
    sent = own.contiguous().reshape(len(own), size).view(torch.uint8)
    found = gather_rows(sent, group).view(own.dtype)
    return found.reshape(len(found), *own.shape[1:])


def rows_of_each(rows: Tensor, counts: Sequence[int], group: ProcessGroup) -> list[Tensor]:
    """The rows of each rank, if it is known how many each has; without a gradient.

    Args:
        rows: Of this rank.
        counts: How many each rank has.
        group: The ranks.

    Shape:
        - rows: (n, *)
        - returns: (n_r, *) for each rank r
    """
    sent = rows.contiguous()
    if len(rows) < max(counts):
        sent = rows.new_zeros(max(counts), *rows.shape[1:])
        sent[: len(rows)] = rows
    found = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(found, sent, group)
    return [each[:n] for each, n in zip(found, counts, strict=True)]


def rows_of_ranks(rows: Tensor, group: ProcessGroup) -> list[int]:
    """How many rows each rank has; waits for the device."""
    own = torch.tensor([rows.shape[0]], device=rows.device)
    found = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, own, group)
    counts: list[int] = torch.cat(found).tolist()
    return counts


def place_of_flags(group: ProcessGroup | None) -> torch.device:
    """Where ranks exchange a few numbers: on the host if they can, where nobody waits for a device.

    Args:
        group: The ranks; None for all.
    """
    if "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None  # a group has the backend of some device
    return accelerator


def raise_together(error: Exception | None, group: ProcessGroup | None, place: Any) -> None:
    """Raise on every rank if there is an error on any of them, so that none waits for it.

    Args:
        error: What is wrong on this rank; None if nothing is.
        group: The ranks that have to go on together; None for this process alone.
        place: The device whose tensors the ranks exchange.

    Raises:
        Exception: The rank's own error, or else one of the same class that names the first rank
            with one.
    """
    if group is None:
        if error is not None:
            raise error
        return
    flag = torch.tensor([int(error is not None)], device=place)
    if not int(all_max(flag, group)):
        return
    errors: list[Exception | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group)
    if error is not None:
        raise error
    rank, other = next((r, e) for r, e in enumerate(errors) if e is not None)
    raise type(other)(f"{other}\n\nThat is so on rank {dist.get_global_rank(group, rank)}.")


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        found = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, group=group)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _EachUses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, common: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return common.view_as(common)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_sum(gradients[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
        place = dist.get_rank(group)
        ctx.own = sum(counts[:place]), counts[place]
        return torch.cat(rows_of_each(rows, counts, group))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].narrow(0, *ctx.own), None, None
