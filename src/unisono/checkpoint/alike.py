"""Reading many files that differ in the values of their tensors alone.

To make sense of a checkpoint takes longer than to read it. Those of one architecture, written by
one program, hold the same names, shapes and order, byte for byte: so one of them is looked at,
and of the others only the values are read, straight into the memory where they are to be.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from unisono.checkpoint.zip_layout import ZipLayout


@dataclass(frozen=True)
class SafetensorsLayout:
    """Safetensors files whose headers are equal.

    Args:
        head: The header, and its length in front.
        size: Of the whole file.
        starts: Name of a tensor -> where it begins in the file.
    """

    head: bytes
    size: int
    starts: Mapping[str, int]

    def find(self, file: FileIO) -> Mapping[str, int] | None:
        """Where the tensors of a file begin; None if it isn't alike."""
        same = os.fstat(file.fileno()).st_size == self.size
        return self.starts if same and file.read(len(self.head)) == self.head else None


Layout: TypeAlias = SafetensorsLayout | ZipLayout


def safetensors_layout(path: Path) -> SafetensorsLayout:
    """The layout of a safetensors file that the library has opened, and so checked."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    entries = json.loads(header)
    data = len(length) + len(header)
    return SafetensorsLayout(
        length + header,
        path.stat().st_size,
        {
            name: data + entry["data_offsets"][0]
            for name, entry in entries.items()
            if name != "__metadata__"
        },
    )


class Rows:
    """The rows of a stacked tensor as memory that a file can be read into.

    Args:
        stacked: (N, *), on any device.
    """

    def __init__(self, stacked: Tensor) -> None:
        self._stacked = stacked.detach()
        self._bytes = None
        if stacked.device.type == "cpu" and stacked.is_contiguous() and stacked.numel():
            self._bytes = _bytes(self._stacked).reshape(len(stacked), -1)

    def fill(self, row: int, file: FileIO, start: int) -> bool:
        """Read a row; False if the file ends before."""
        if self._bytes is not None:
            return _read_into(self._bytes[row].data, file, start)
        values = torch.empty(self._stacked.shape[1:], dtype=self._stacked.dtype)
        if values.numel() and not _read_into(_bytes(values).data, file, start):
            return False
        self._stacked[row].copy_(values)
        return True


def fill(layout: Layout, path: Path, rows: Mapping[str, Rows], row: int) -> bool:
    """Read a file that is like the one of the layout.

    Args:
        layout: Of another file, whose tensors have the shapes and dtypes of ``rows``.
        path: The file.
        rows: Name of a tensor in the file -> where its values are to be.
        row: Which of the rows.

    Returns:
        Whether it was alike; if not, the row may hold anything.

    Raises:
        OSError: If it can't be read.
    """
    with path.open("rb", buffering=0) as file:
        starts = layout.find(file)
        return starts is not None and all(
            own.fill(row, file, starts[name]) for name, own in rows.items()
        )


def _bytes(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _read_into(memory: memoryview, file: FileIO, start: int) -> bool:
    file.seek(start)
    done = 0
    while done < len(memory):  # one call reads at most 2 GB
        count = file.readinto(memory[done:])
        if not count:
            return False
        done += count
    return True
