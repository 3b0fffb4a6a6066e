"""How `torch.distributed.checkpoint` sees a block of members: as rows of larger tensors.

A `DTensor` with ``Shard(0)`` can't say it where N is no multiple of the number of blocks: its parts
are those of `torch.chunk`, so 9 members on 4 ranks would be 3, 3, 3 and none, and no rank may be
without a member. So the tensors stay ordinary ones, and these planners tell which rows they are.
What is stored is the same as of a `DTensor`: chunks with offsets in a tensor of N rows, that any
number of ranks, or a program without unisono, can read.
"""

from __future__ import annotations

import io
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from unisono.block import Block
from unisono.ensemble import Ensemble
from unisono.errors import CheckpointError


def stacked_names(part: Ensemble) -> frozenset[str]:
    """The names in ``part.state_dict()`` of the tensors that have a row for each member."""
    single = {f"members.{name}" for name in part.shared} | {"combination.pooled_temperature"}
    return frozenset(part.state_dict()) - single


class BlockSavePlanner(DefaultSavePlanner):
    """Saves the tensors of a block as rows ``first, ..., first + size - 1`` of N.

    Args:
        block: The place of this rank.
        stacked: Which entries of the state have a member axis, by their names in the flattened
            state, such as ``"model.members.fc1.weight"``. Others are the same on every rank, and
            written once; so are the rows of replicas.
    """

    def __init__(self, block: Block, stacked: Collection[str]) -> None:
        super().__init__()
        self._block = block
        self._stacked = frozenset(stacked)

    def create_local_plan(self) -> SavePlan:
        """Place the items of this rank among those of all."""
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[self._placed(item) for item in plan.items])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """This rank's tensor; the offset in the index is that among all members."""
        return self.state_dict[index.fqn]

    def _placed(self, item: WriteItem) -> WriteItem:
        if item.index.fqn not in self._stacked or item.tensor_data is None:
            return item
        own = item.tensor_data.size
        chunk = _chunk(self._block, own)
        data = replace(
            item.tensor_data,
            chunk=chunk,
            size=torch.Size([self._block.num_members, *own[1:]]),
        )
        index = MetadataIndex(item.index.fqn, chunk.offsets)
        return replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data)


class BlockLoadPlanner(DefaultLoadPlanner):
    """Loads the rows of a block into its tensors, in place, however they were spread when saved.

    Args:
        block: The place of this rank.
        stacked: As for `BlockSavePlanner`.
    """

    def __init__(self, block: Block, stacked: Collection[str]) -> None:
        super().__init__()
        self._block = block
        self._stacked = frozenset(stacked)

    def create_local_plan(self) -> LoadPlan:
        """Read what all ranks have as it is, and of the others this rank's rows."""
        assert self.metadata is not None
        stacked = {n: value for n, value in self.state_dict.items() if n in self._stacked}
        others = {n: value for n, value in self.state_dict.items() if n not in self._stacked}
        items: list[ReadItem] = []
        problems = []
        for name, tensor in stacked.items():
            stored = self.metadata.state_dict_metadata.get(name)
            wanted = torch.Size([self._block.num_members, *tensor.shape[1:]])
            if not isinstance(stored, TensorStorageMetadata):
                problems.append(f"`{name}` is missing; expected shape {tuple(wanted)}")
            elif stored.size != wanted:
                problems.append(f"`{name}` has shape {tuple(stored.size)}, not {tuple(wanted)}")
            else:
                chunks = [_chunk(self._block, tensor.shape)]
                items += create_read_items_for_chunk_list(name, stored, chunks)
        if problems:
            raise CheckpointError("; ".join(problems))
        # Not that of the base class, which takes the stacked ones for those of an older version.
        plan = create_default_local_load_plan(others, self.metadata, not self.allow_partial_load)
        return replace(plan, items=[*plan.items, *items])

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """This rank's tensor; the offset in the index is that among all members."""
        found: Tensor = self.state_dict[index.fqn]
        return found

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuse: bytes are a pickle, and nothing in a file is executed."""
        raise CheckpointError(
            f"`{read_item.dest_index.fqn}` is stored as a Python object, and not as a tensor"
        )


def _chunk(block: Block, shape: torch.Size) -> ChunkStorageMetadata:
    if shape[0] != block.size:
        raise CheckpointError(f"the block has {block.size} members, a tensor {shape[0]} rows")
    offsets = torch.Size([block.first, *[0] * (len(shape) - 1)])
    return ChunkStorageMetadata(offsets=offsets, sizes=shape)
