"""Whether a training is this process' alone, or one of all processes that `torchrun` started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from unisono.distributed.meeting import new_store
from unisono.distributed.mesh import check_mesh, make_mesh
from unisono.distributed.sharding import place
from unisono.ensemble import Ensemble
from unisono.training.ranks import Ranks, alone

MeshChoice: TypeAlias = DeviceMesh | Literal["auto"] | None

_TIMEOUT: Final = timedelta(minutes=5)
_STARTED: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR")


@contextmanager
def joined(ens: Ensemble, mesh: MeshChoice) -> Iterator[Ranks]:
    """The ranks that train an ensemble together; groups that this makes end with the block.

    Args:
        ens: All members, or a block of them, whose mesh it has.
        mesh: As for `unisono.fit`.

    Raises:
        ValueError: If the mesh doesn't fit, or there are fewer members than blocks.
        TypeError: If it is none.
    """
    if ens.block is not None and ens.block.mesh is not None:
        if mesh is not None and mesh != "auto" and mesh is not ens.block.mesh:
            raise ValueError(
                "fit: this ensemble is a block of members on a mesh of its own, so leave mesh= out"
            )
        yield Ranks(ens.block, ens.block.members)
    elif mesh is None:
        yield alone(len(ens))
    elif mesh != "auto":
        yield _with_all(ens, check_mesh("fit", mesh))
    elif not is_one_of_many():
        yield alone(len(ens))
    else:
        kind = next(ens.parameters()).device.type
        with _group():
            yield _with_all(ens, make_mesh(device_type=kind, timeout=_TIMEOUT))


def is_one_of_many() -> bool:
    """Whether other processes run this program, started by `torchrun` or the like."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return dist.get_world_size() > 1
    return all(n in os.environ for n in _STARTED) and int(os.environ["WORLD_SIZE"]) > 1


def is_first_of_all() -> bool:
    """Whether this process shows and writes what all have."""
    if not is_one_of_many():
        return True
    return (dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])) == 0


def _with_all(ens: Ensemble, mesh: DeviceMesh) -> Ranks:
    return Ranks(place("fit", len(ens), mesh), range(len(ens)))


@contextmanager
def _group() -> Iterator[None]:
    """The group of all processes: the one there is, or one for as long as this lasts."""
    if dist.is_initialized():
        yield
        return
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, world = new_store("fit", _TIMEOUT)
    dist.init_process_group(store=store, rank=rank, world_size=world, timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
