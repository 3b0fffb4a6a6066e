"""Shards of an ensemble by `torch.distributed.checkpoint`, in safetensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import WriteResult

from unisono.block import Block
from unisono.distributed.planners import BlockLoadPlanner, BlockSavePlanner
from unisono.distributed.saving import Parts
from unisono.errors import CheckpointError


def write(call: str, parts: Parts) -> None:
    """Write what all ranks have, and wait for it."""
    with told(call):
        save(
            parts.state,
            storage_writer=_Writer(parts.data, parts.at_end),
            planner=BlockSavePlanner(parts.block, parts.stacked),
            no_dist=not dist.is_initialized(),
        )


def begin_to_write(parts: Parts, group: ProcessGroup | None) -> Future[Any]:
    """Copy what this rank has, and write it while the program goes on."""
    found = async_save(
        parts.state,
        storage_writer=_Writer(parts.data, parts.at_end),
        planner=BlockSavePlanner(parts.block, parts.stacked),
        process_group=group,
    )
    assert isinstance(found, Future)  # it is another only for a stager of one's own
    return found


def read(
    call: str,
    data: Path,
    state: dict[str, Any],
    block: Block,
    stacked: frozenset[str],
    *,
    alone: bool,
) -> None:
    """Read the rows of a block into its tensors, in place.

    Args:
        call: The function that the user called, for the message.
        data: The folder with the shards.
        state: Tensors by name.
        block: The place of this rank.
        stacked: Which tensors have a row for each member.
        alone: Whether no other rank reads at the same time.
    """
    with told(call):
        load(
            state,
            storage_reader=HuggingFaceStorageReader(str(data)),
            planner=BlockLoadPlanner(block, stacked),
            no_dist=alone,
        )


def stored(data: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of the tensors whose shards are in a folder."""
    entries = HuggingFaceStorageReader(str(data)).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }


@contextmanager
def told(call: str) -> Iterator[None]:
    """Tell what `torch.distributed.checkpoint` raises, which is no `Exception`, as an error."""
    try:
        with warnings.catch_warnings():
            # Of a process alone, for which that is no mistake.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")
            yield
    except CheckpointException as error:
        texts = [
            f"rank {rank}: {type(found[0]).__name__}: {found[0]}"
            for rank, found in sorted(error.failures.items())
        ]
        raise CheckpointError(f"{call}: {'; '.join(texts)}") from error


class _Writer(HuggingFaceStorageWriter):
    """Torch's writer of safetensors, which at the end does something once for all ranks."""

    def __init__(self, path: Path, at_end: Callable[[], None]) -> None:
        super().__init__(str(path), save_distributed=True)
        self._at_end = at_end

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on one rank, when all have written."""
        super().finish(metadata, results)
        self._at_end()
