"""One ensemble over many ranks: each holds a block of its members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from unisono.block import Block, block_of
from unisono.collectives import MEMBER
from unisono.distributed.agreement import agree, facts_of, values_of
from unisono.distributed.mesh import check_mesh
from unisono.engine.axis import Randomness
from unisono.engine.planning.plan import StrategyName
from unisono.ensemble import Ensemble
from unisono.module_tree import named_tensors
from unisono.options import check_build


def shard(ens: Ensemble, mesh: DeviceMesh) -> Ensemble:
    """Take this rank's block of the members: ``shard(ens, mesh)[i] == ens[block.first + i]``.

    Every rank has the whole ensemble and keeps a copy of its block; where the whole is too large
    for one rank, `build` makes no more than the block. Blocks are of consecutive members, and the
    first ones are longer by one where N is no multiple of the number of blocks. The ensembles of
    all ranks are compared, down to their values.

    Args:
        ens: The whole ensemble, the same on every rank.
        mesh: The ranks; see `make_mesh`.

    Returns:
        An ordinary ensemble of the block's members. Its ``block`` tells their place among all, its
        calls return their outputs, and dropout draws other numbers on every rank.

    Raises:
        EnsembleError: If the ranks have different ensembles, or this process has no others.
        ValueError: If the mesh doesn't fit, or there are fewer members than blocks.
        TypeError: If these are no ensemble and no mesh.

    Example:
        >>> part = shard(ens, make_mesh())  # doctest: +SKIP
        >>> part.block.members, len(part)  # doctest: +SKIP
        (range(3, 5), 2)
    """
    call = "distributed.shard"
    check_mesh(call, mesh)

    def make() -> Ensemble:
        _check_whole(call, ens)
        block = place(call, len(ens), mesh)
        part = ens[block.slice]
        part.block = block
        return part

    return together(call, make, lambda: values_of(ens))


def build(
    make_model: Callable[[], nn.Module],
    n: int,
    mesh: DeviceMesh,
    *,
    seed: int = 0,
    shared: str | Sequence[str] = (),
    strategy: StrategyName = "auto",
    randomness: Randomness = "different",
    chunk_size: int | Literal["auto"] | None = None,
    memory_limit: int | None = None,
) -> Ensemble:
    """Build this rank's block of an ensemble of n new models, and no other members.

    Member i is ``make_model()`` under ``torch.manual_seed(seed + i)``, whatever the number of
    ranks: ``build(make_model, n, mesh)`` equals ``shard(Ensemble.build(make_model, n), mesh)``.

    Args:
        make_model: Returns a new model each time it is called.
        n: The number of members on all ranks.
        mesh: The ranks; see `make_mesh`.
        seed: Seed of member 0.
        shared: As for `Ensemble`; all members get the values of member 0, which the first rank
            sends to the others.
        strategy: As for `Ensemble`.
        randomness: As for `Ensemble`.
        chunk_size: As for `Ensemble`.
        memory_limit: As for `Ensemble`.

    Returns:
        As for `shard`.

    Raises:
        EnsembleError: If the ranks build different models, or this process has no others.
        ValueError: If the mesh doesn't fit, or there are fewer members than blocks.
        Exception: What ``make_model`` raises.

    Example:
        >>> part = build(lambda: nn.Linear(3, 2), 8, make_mesh())  # doctest: +SKIP
        >>> len(part)  # doctest: +SKIP
        4
    """
    call = "distributed.build"
    check_mesh(call, mesh)

    def make() -> Ensemble:
        check_build(make_model, n, seed)
        block = place(call, n, mesh)
        part = Ensemble.build(
            make_model,
            block.size,
            seed=seed + block.first,
            shared=shared,
            strategy=strategy,
            randomness=randomness,
            chunk_size=chunk_size,
            memory_limit=memory_limit,
        )
        part.block = block
        return part

    part = together(call, make, lambda: {"seed": str(seed)})
    share_from_first(part)
    return part


def together(
    call: str, make: Callable[[], Ensemble], facts: Callable[[], Mapping[str, str]] = dict
) -> Ensemble:
    """Make the part of every rank, or raise on every rank if one can't, or is of another whole.

    Args:
        call: The function that the user called, for the message.
        make: Makes this rank's part, with its block.
        facts: What has to be equal on all ranks, beside the architecture.

    Raises:
        EnsembleError: If ``make`` raised on another rank, or the parts don't fit together.
        Exception: What ``make`` raised on this one.
    """
    error: Exception | None = None
    found: dict[str, str] = {}
    try:
        part = make()
        assert part.block is not None
        found = {**facts_of(part, part.block.num_members), **facts()}
    except Exception as raised:
        error = raised
    agree(call, found, error)
    return part


def place(call: str, num_members: int, mesh: DeviceMesh) -> Block:
    """This rank's block of so many members; the mesh has been checked.

    Args:
        call: The function that the user called, for the message.
        num_members: Of the whole ensemble.
        mesh: The ranks.

    Raises:
        ValueError: If there are fewer members than blocks.
    """
    blocks = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True))[MEMBER]
    if num_members < blocks:
        raise ValueError(
            f"{call}: every rank along the axis {MEMBER!r} has at least one member, but there are"
            f" {num_members} members for {blocks} ranks; take a smaller mesh, or let ranks share a"
            f" block: make_mesh(data={-(-blocks // max(num_members, 1))})"
        )
    return block_of(num_members, mesh)


@torch.no_grad()
def share_from_first(part: Ensemble) -> None:
    """Give what all members share the values that it has on the first rank, in place."""
    block = part.block
    assert block is not None
    assert block.mesh is not None
    group = block.mesh.get_group(MEMBER)
    named = named_tensors(part.members)
    tensors = {id(named[name]): named[name] for name in sorted(part.shared)}
    for tensor in tensors.values():
        value = tensor.detach().contiguous()
        dist.broadcast(value, group=group, group_src=0)
        tensor.copy_(value)


def _check_whole(call: str, ens: Ensemble) -> None:
    if not isinstance(ens, Ensemble):
        raise TypeError(f"{call}: the first argument is an Ensemble, got {type(ens).__name__}")
    if ens.block is not None:
        raise ValueError(
            f"{call}: this ensemble is a block already, of members {ens.block.first} to"
            f" {ens.block.first + ens.block.size - 1}; pass the whole ensemble"
        )
