"""Loading an ensemble onto ranks, however many there were when it was saved."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from unisono.block import Block
from unisono.checkpoint import ensemble_file
from unisono.distributed.agreement import agree, facts_of
from unisono.distributed.folder import INDEX, TEMPLATE, read_index
from unisono.distributed.mesh import check_mesh
from unisono.distributed.saving import STATE, block_of_all
from unisono.distributed.sharding import place
from unisono.ensemble import Ensemble
from unisono.errors import CheckpointError
from unisono.optim import MemberOptimizer
from unisono.optim.groups import pick
from unisono.training.plain import from_plain


def load(
    path: str | os.PathLike[str],
    make_model: Callable[[], nn.Module],
    mesh: DeviceMesh | None = None,
    *,
    device: str | torch.device | None = None,
) -> Ensemble:
    """Load this rank's block of a saved ensemble, and no other members.

    The number of ranks needn't be that of the save. Nothing in the files is executed.

    Args:
        path: A folder that `save` wrote, or a file of `Ensemble.save`.
        make_model: Returns a model of the members' architecture; it is called once, and its
            values aren't used.
        mesh: The ranks; None loads all members into this process.
        device: Where the tensors are to lie; None for where the model's lie.

    Returns:
        As for `shard`; for ``mesh=None`` an ordinary ensemble.

    Raises:
        OSError: If it can't be read.
        CheckpointError: If it is something else, damaged, incomplete, or of another architecture.
        EnsembleError: If only another rank can't load it.
        ValueError: If the mesh doesn't fit, or there are fewer members than blocks.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> path = f"{tempfile.mkdtemp()}/ens.safetensors"
        >>> Ensemble.build(lambda: nn.Linear(3, 2), 5).save(path)
        >>> len(load(path, lambda: nn.Linear(3, 2)))  # with mesh=, those of this rank
        5
    """
    from unisono.distributed import storage  # not above: it takes torch a second to import

    call = "distributed.load"
    if mesh is not None:
        check_mesh(call, mesh)
    source = Path(path)
    is_folder = (source / INDEX).exists() or (source.is_dir() and not _is_file(source))
    error: Exception | None = None
    facts: dict[str, str] = {}
    try:
        n = read_index(call, source).members if is_folder else _members_in(source)
        block = Block(n, 0, n) if mesh is None else place(call, n, mesh)
        if is_folder:
            index = read_index(call, source)
            data = source / index.data
            chosen, inside = [0] * block.size, data / TEMPLATE
        else:
            chosen, inside = list(block.members), source
        part = Ensemble.load(inside, make_model, members=chosen, device=device)
        facts = facts_of(part, n)
    except Exception as found:
        error = found
    if mesh is not None:
        agree(call, facts, error)
    elif error is not None:
        raise error
    if mesh is not None:
        part.block = block
    if is_folder:
        state = {k: v.detach() for k, v in part.state_dict().items() if isinstance(v, Tensor)}
        storage.read(call, data, state, block, frozenset(index.stacked), alone=mesh is None)
    return part


def load_optimizer(
    folder: str | os.PathLike[str], ens: Ensemble, optimizer: MemberOptimizer
) -> None:
    """Bring an optimizer to where that of the saved ensemble stood.

    Args:
        folder: What `save` wrote, with an optimizer.
        ens: What `load` returned for it.
        optimizer: Of the same class, for ``ens``.

    Raises:
        OSError: If the folder can't be read.
        CheckpointError: If it holds no such optimizer, or is incomplete.
        EnsembleError: If that is so on another rank only.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from unisono.distributed import save
        >>> from unisono.optim import SGD
        >>> ens = Ensemble.build(lambda: nn.Linear(3, 2), 5)
        >>> folder = tempfile.mkdtemp()
        >>> save(ens, folder, SGD(ens, lr=0.5))
        >>> again = load(folder, lambda: nn.Linear(3, 2))
        >>> optimizer = SGD(again, lr=0.1)
        >>> load_optimizer(folder, again, optimizer)
        >>> optimizer.param_groups[0]["lr"]
        0.5
    """
    from unisono.distributed import storage

    call, source = "distributed.load_optimizer", Path(folder)
    block = block_of_all(ens)
    error: Exception | None = None
    try:
        index = read_index(call, source)
        if index.optimizer != type(optimizer).__name__ or index.members != block.num_members:
            raise CheckpointError(
                f"{call}: {source} holds {index.members} members with"
                f" {index.optimizer or 'no optimizer'}, but this is {type(optimizer).__name__} of"
                f" {block.num_members}"
            )
        data = source / index.data
        stored = storage.stored(data)
        state: dict[str, Tensor] = {}
        for name in (name for name in stored if name.startswith(STATE)):
            shape, dtype = stored[name]
            rows = (block.size, *shape[1:]) if name in index.stacked else shape
            state[name] = torch.zeros(rows, dtype=dtype)
        groups = pick(from_plain(index.groups), block.num_members, list(block.members))
        own = optimizer.state_dict()["param_groups"]
        if len(groups) != len(own):
            raise CheckpointError(
                f"{call}: the optimizer in {source} has {len(groups)} param groups for these"
                f" members, this one has {len(own)}; make it with the same params=, and one value"
                f" per member where that one had them"
            )
    except Exception as found:
        error = found
    if block.mesh is not None:
        agree(call, {}, error)
    elif error is not None:
        raise error
    stacked = frozenset(index.stacked)
    storage.read(call, data, state, block, stacked, alone=block.mesh is None)
    kept: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        k, key = name.removeprefix(STATE).split(".", 1)
        kept.setdefault(int(k), {})[key] = tensor
    places = ("params", "member")
    merged = [
        {**new, **{key: mine[key] for key in places}} for new, mine in zip(groups, own, strict=True)
    ]
    optimizer.load_state_dict({"state": kept, "param_groups": merged})


def _is_file(path: Path) -> bool:
    return (path / ensemble_file.NAME).exists()


def _members_in(path: Path) -> int:
    with ensemble_file.open_ensemble(path) as (_, facts):
        return facts.members
