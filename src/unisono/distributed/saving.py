"""Saving an ensemble whose members are spread over ranks: each rank writes its own."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from unisono.block import Block
from unisono.distributed.agreement import agree
from unisono.distributed.folder import TEMPLATE, Index, shards_in, write_index
from unisono.ensemble import Ensemble
from unisono.optim import MemberOptimizer
from unisono.optim.groups import join
from unisono.training.plain import to_plain

STATE: Final = "optimizer."
_TIMEOUT: Final = timedelta(minutes=30)


def save(
    ens: Ensemble, folder: str | os.PathLike[str], optimizer: MemberOptimizer | None = None
) -> None:
    """Write an ensemble to a folder, each rank the rows of its own members.

    `load` gives it back on any number of ranks. Every rank has to call this, with a folder that
    all of them see. An ensemble that was in the folder is replaced when the new one is whole;
    after a crash or on a full disk it is as it was. The files are safetensors and JSON, so reading
    them executes nothing, and `torch.distributed.checkpoint` writes and reads them.

    Args:
        ens: A block, as `shard`, `build` and `load` return it, or a whole ensemble.
        folder: It is made if it isn't there; its parent is.
        optimizer: The optimizer of ``ens``, to be saved with it.

    Raises:
        CheckpointError: If a rank can't write.
        OSError: If this one can't.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from unisono.distributed import load
        >>> folder = tempfile.mkdtemp()
        >>> save(Ensemble.build(lambda: nn.Linear(3, 2), 5), folder)
        >>> len(load(folder, lambda: nn.Linear(3, 2)))
        5
    """
    from unisono.distributed import storage  # not above: it takes torch a second to import

    storage.write("distributed.save", _prepared("distributed.save", ens, Path(folder), optimizer))


def async_save(
    ens: Ensemble, folder: str | os.PathLike[str], optimizer: MemberOptimizer | None = None
) -> Saving:
    """Begin to write an ensemble to a folder as `save` does, and go on meanwhile.

    All values are copied before this returns; what is trained afterwards isn't in the folder.

    Args:
        ens: As for `save`.
        folder: As for `save`.
        optimizer: As for `save`.

    Returns:
        What waits for the end: ``saving.wait()``. Every rank has to call that, before the next
        one begins.

    Raises:
        RuntimeError: If `torch.distributed` isn't initialised.
        OSError: If this rank can't write.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from unisono.distributed import load
        >>> store = dist.HashStore()  # torchrun gives one; here is a single rank
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> folder = tempfile.mkdtemp()
        >>> saving = async_save(Ensemble.build(lambda: nn.Linear(3, 2), 5), folder)
        >>> saving.wait()  # train on before
        >>> len(load(folder, lambda: nn.Linear(3, 2)))
        5
        >>> dist.destroy_process_group()
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "distributed.async_save: the ranks are told of each other's end by torch.distributed,"
            " which is not initialised; call distributed.save, or begin with"
            " mesh = unisono.distributed.make_mesh()"
        )
    from unisono.distributed import storage

    parts = _prepared("distributed.async_save", ens, Path(folder), optimizer)
    # A group of its own: its messages must not come between those of the training.
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    return Saving(storage.begin_to_write(parts, group), group)


class Saving:
    """A save that goes on; `async_save` begins it.

    Args:
        future: That of `torch.distributed.checkpoint`.
        group: The group that it uses.

    Example:
        >>> written: Future[None] = Future()
        >>> saving = Saving(written, None)
        >>> saving.done()
        False
        >>> written.set_result(None)
        >>> saving.wait()
        >>> saving.done()
        True
    """

    def __init__(self, future: Future[Any], group: ProcessGroup | None) -> None:
        self._future = future
        self._group = group

    def done(self) -> bool:
        """Whether this rank is ready; the folder is that of this save when all are."""
        return self._future.done()

    def wait(self) -> None:
        """Wait until the folder is whole.

        Raises:
            CheckpointError: If a rank couldn't write; the folder is then as before.
        """
        from unisono.distributed import storage

        try:
            with storage.told("distributed.async_save"):
                self._future.result()
        finally:
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None


@dataclass(frozen=True, eq=False)
class Parts:
    """What one rank writes.

    Args:
        data: The folder for shards.
        state: Tensors by name, contiguous.
        block: The place of this rank.
        stacked: Which tensors have a row for each member.
        at_end: Called on one rank when all have written.
    """

    data: Path
    state: dict[str, Tensor]
    block: Block
    stacked: frozenset[str]
    at_end: Callable[[], None]


def block_of_all(ens: Ensemble) -> Block:
    """Its place among all members; that of the only block for a whole ensemble."""
    return ens.block or Block(len(ens), 0, len(ens))


def state_of(
    ens: Ensemble, optimizer: MemberOptimizer | None
) -> tuple[dict[str, Tensor], set[str]]:
    """All tensors by name, not copied, and which of them have a row for each member."""
    state = {name: value for name, value in ens.state_dict().items() if isinstance(value, Tensor)}
    from unisono.distributed.planners import stacked_names

    stacked = set(stacked_names(ens))
    if optimizer is not None:
        shared = {id(p) for name, p in ens.members.named_parameters() if name in ens.shared}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for k, parameter in enumerate(parameters):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    state[f"{STATE}{k}.{key}"] = value
                    if id(parameter) not in shared:
                        stacked.add(f"{STATE}{k}.{key}")
    return state, stacked


def _prepared(call: str, ens: Ensemble, folder: Path, optimizer: MemberOptimizer | None) -> Parts:
    token = [secrets.token_hex(8)]
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if dist.is_initialized():
        dist.broadcast_object_list(token, src=0)
    data = folder / f"data-{token[0]}"
    error: Exception | None = None
    facts: dict[str, str] = {}
    try:
        block = block_of_all(ens)
        state, stacked = state_of(ens, optimizer)
        if is_first:
            data.mkdir(parents=False) if folder.is_dir() else data.mkdir(parents=True)
            (data / TEMPLATE).mkdir()
            ens[[0]].save(data / TEMPLATE / "model.safetensors")
        facts = {"number of members": str(block.num_members), "tensors": str(sorted(state))}
        facts |= {"folder": str(folder), "optimizer": type(optimizer).__name__}
    except Exception as found:
        error = found
    if dist.is_initialized():
        agree(call, facts, error)
    elif error is not None:
        raise error
    groups = None if optimizer is None else _groups(optimizer, block)

    def at_end() -> None:
        name = "" if optimizer is None else type(optimizer).__name__
        files = shards_in(data)
        write_index(
            folder, Index(block.num_members, data.name, files, sorted(stacked), name, groups)
        )

    # The format has no strides.
    plain = {name: value.detach().contiguous() for name, value in state.items()}
    return Parts(data, plain, block, frozenset(stacked), at_end)


def _groups(optimizer: MemberOptimizer, block: Block) -> Any:
    """The param groups of all members, without their parameters."""
    own = [(block.index, block.size, optimizer.state_dict()["param_groups"])]
    found: list[Any] = [own[0]]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, own[0])
    blocks = {index: (size, groups) for index, size, groups in found}
    parts = [blocks[index] for index in sorted(blocks)]
    return to_plain(join(parts), "the optimizer's state")
