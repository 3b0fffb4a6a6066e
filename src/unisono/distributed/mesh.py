"""The ranks of a job as a mesh: blocks of members along one axis, replicas along the other."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from unisono.block import DATA
from unisono.collectives import MEMBER
from unisono.distributed.meeting import new_store
from unisono.errors import EnsembleError

START = "torchrun --nproc-per-node 2 train.py"


def make_mesh(
    *,
    data: int = 1,
    device_type: str | None = None,
    timeout: timedelta = timedelta(minutes=5),
) -> DeviceMesh:
    """Join the other processes that `torchrun` started, and arrange all of them in a mesh.

    With ``data=1`` the mesh has the one axis ``"member"``; else ``"member"`` and ``"data"``, and
    each block of members is held by as many ranks, next to each other. It is an ordinary
    `torch.distributed.DeviceMesh`. (`torch.distributed.init_device_mesh` makes one that serves as
    well, but the groups of its axes wait half an hour for a rank that hangs.)

    Args:
        data: The number of replicas of each block.
        device_type: ``"cpu"`` or ``"cuda"``; that of the accelerator if there is one. Each
            process then uses the device of its local rank.
        timeout: How long a collective waits for the other ranks before it raises.

    Returns:
        The mesh.

    Raises:
        EnsembleError: If this process wasn't started with others.
        ValueError: If the number of ranks isn't a multiple of ``data``.

    Example:
        >>> make_mesh()
        Traceback (most recent call last):
        unisono.errors.EnsembleError: distributed.make_mesh: this process belongs to no group ...
    """
    call = "distributed.make_mesh"
    device_type = _device_type() if device_type is None else device_type
    if not _is_initialised():
        _check_started(call)
        if device_type != "cpu":
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        store, rank, world = new_store(call, timeout)
        dist.init_process_group(store=store, rank=rank, world_size=world, timeout=timeout)
    world = dist.get_world_size()
    if not isinstance(data, int) or data < 1 or world % data:
        raise ValueError(
            f"{call}: data is the number of replicas of a block, which divides the number of ranks,"
            f" but there are {world} ranks and data={data!r}"
        )
    ranks = torch.arange(world).reshape(-1, data)  # (blocks, replicas)
    member = _own_group(ranks.T.tolist(), timeout)
    if data == 1:
        mesh = DeviceMesh.from_group(member, device_type, mesh_dim_names=(MEMBER,))
    else:
        groups = [member, _own_group(ranks.tolist(), timeout)]
        names = (MEMBER, DATA)
        mesh = DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=names)
    return mesh


def check_mesh(call: str, mesh: Any) -> DeviceMesh:
    """Return it if members can be spread over it, or raise with all that is wrong.

    What is wrong is wrong on every rank, so all of them raise.

    Raises:
        EnsembleError: If this process wasn't started with others.
        TypeError: If it is no mesh.
        ValueError: If its axes are others, or it has not all ranks.
    """
    if not _is_initialised():
        _check_started(call)
        raise EnsembleError(
            f"{call}: torch.distributed is not initialised; begin with"
            f" mesh = unisono.distributed.make_mesh()"
        )
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"{call}: mesh is a torch.distributed.DeviceMesh, got {type(mesh).__name__}; make one"
            f" by mesh = unisono.distributed.make_mesh()"
        )
    names, world = mesh.mesh_dim_names, dist.get_world_size()
    problems = []
    if names not in ((MEMBER,), (MEMBER, DATA)):
        problems.append(
            f'its axes are ("{MEMBER}",) or ("{MEMBER}", "{DATA}"), but they are {names} of a mesh'
            f" of shape {tuple(mesh.shape)}"
        )
    if mesh.size() != world:
        problems.append(f"it has every rank, but it has {mesh.size()} of {world}")
    if problems:
        raise ValueError(
            f"{call}: the mesh doesn't fit: {'; '.join(problems)}. Make it by"
            f" mesh = unisono.distributed.make_mesh(data=...)"
        )
    return mesh


def _own_group(all_ranks: list[list[int]], timeout: timedelta) -> ProcessGroup:
    """The one of these groups that this rank belongs to; every rank makes all of them."""
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in all_ranks]
    own = [ranks for ranks in all_ranks if dist.get_rank() in ranks]
    found: ProcessGroup = groups[all_ranks.index(own[0])]
    return found


def _check_started(call: str) -> None:
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise EnsembleError(
            f"{call}: this process belongs to no group of processes ({', '.join(missing)} are not"
            f" in the environment); start the program by\n\n    {START}"
        )


def _is_initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device_type() -> str:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type
