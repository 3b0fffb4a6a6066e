"""Reading many files that differ in the values of their tensors alone.

To make sense of a checkpoint takes longer than to read it. Those of one architecture, written by
one program, hold the same names, shapes and order, byte for byte: so one of them is looked at,
and of the others only the values are read, straight into the memory where they are to be.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from unisono.checkpoint.archive import open_archive, start_of

_PICKLE: Final = "data.pkl"
_ORDER: Final = "byteorder"
_STORAGES: Final = "data/"
# What looking at a damaged zip file may raise. The usual way then says what is wrong with it.
_NO_ZIP: Final = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError),
    *(ValueError, KeyError, EOFError, struct.error),
)


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

    def find(self, file: BufferedReader) -> Mapping[str, int] | None:
        """Where the tensors of a file begin; None if it isn't alike."""
        same = os.fstat(file.fileno()).st_size == self.size
        return self.starts if same and file.read(len(self.head)) == self.head else None


@dataclass(frozen=True)
class ZipLayout:
    """Files of `torch.save` that hold one and the same pickle.

    https://docs.pytorch.org/docs/stable/notes/serialization.html: a zip file with ``data.pkl``
    and one uncompressed record ``data/KEY`` for each storage.

    Args:
        same: Records that are equal in all of them -> content.
        sizes: Record of a storage -> bytes.
        places: Name of a tensor -> its record, and where it begins there.
    """

    same: Mapping[str, bytes]
    sizes: Mapping[str, int]
    places: Mapping[str, tuple[str, int]]

    def find(self, file: BufferedReader) -> Mapping[str, int] | None:
        """Where the tensors of a file begin; None if it isn't alike."""
        try:
            archive = open_archive(file)
            records = _records(archive)
            sizes = {key: r.file_size for key, r in records.items() if key.startswith(_STORAGES)}
            if sizes != self.sizes:
                return None
            if any(archive.read(records[key]) != content for key, content in self.same.items()):
                return None
            starts = {key: start_of(file, records[key]) for key in self.sizes}
        except _NO_ZIP:
            return None
        return {name: starts[key] + offset for name, (key, offset) in self.places.items()}


Layout: TypeAlias = SafetensorsLayout | ZipLayout


def fill(layout: Layout, path: Path, rows: Mapping[str, Tensor]) -> bool:
    """Read a file that is like the one of the layout.

    Args:
        layout: Of another file, whose tensors have the shapes and dtypes of ``rows``.
        path: The file.
        rows: Name of a tensor in the file -> where its values are to be.

    Returns:
        Whether it was alike; if not, the rows may hold anything.

    Raises:
        OSError: If it can't be read.
    """
    with path.open("rb") as file:
        starts = layout.find(file)
        return starts is not None and all(
            _read_into(row, file, starts[name]) for name, row in rows.items()
        )


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


def zip_layout(path: Path, state: Any) -> ZipLayout | None:
    """The layout of a file of `torch.save`, from what `torch.load` with ``mmap=True`` gave of it.

    Args:
        path: The file.
        state: A state dict whose tensors lie in the memory of the file.

    Returns:
        The layout; None if not every tensor is a piece of the file, in order.
    """
    if not isinstance(state, Mapping) or not all(_is_piece(tensor) for tensor in state.values()):
        return None
    with path.open("rb") as file:
        try:
            archive = open_archive(file)
            records = _records(archive)
            starts = {k: start_of(file, r) for k, r in records.items() if k.startswith(_STORAGES)}
            same: dict[str, bytes] = {
                key: archive.read(records[key]) for key in (_PICKLE, _ORDER) if key in records
            }
        except _NO_ZIP:  # torch itself compares no checksums
            return None
    if same.get(_ORDER, b"little").decode() != sys.byteorder:
        return None  # its values have to be turned round
    # All storages are pieces of one map of the file: they lie there as they lie in the file.
    storages = sorted({tensor.untyped_storage().data_ptr() for tensor in state.values()})
    keys = sorted(starts, key=lambda key: starts[key])
    if [p - storages[0] for p in storages] != [starts[k] - starts[keys[0]] for k in keys]:
        return None
    key_at = dict(zip(storages, keys, strict=True))
    places = {
        name: (
            key_at[tensor.untyped_storage().data_ptr()],
            tensor.storage_offset() * tensor.dtype.itemsize,
        )
        for name, tensor in state.items()
    }
    return ZipLayout(same, {key: records[key].file_size for key in keys}, places)


def _is_piece(tensor: Any) -> bool:
    """Whether the memory of a tensor is its elements in order, and some of a file's."""
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and tensor.untyped_storage().nbytes() > 0
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg() or tensor.is_quantized)
    )


def _records(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The records by their names, without the folder that all are in."""
    found = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if any(info.compress_type != zipfile.ZIP_STORED for info in found.values()):
        raise ValueError("torch.save compresses nothing")
    return found


def _read_into(row: Tensor, file: BufferedReader, start: int) -> bool:
    """Read the values of a row; False if the file ends before."""
    is_direct = row.device.type == "cpu" and row.is_contiguous()
    target = row if is_direct else torch.empty(row.shape, dtype=row.dtype)
    memory = target.view(-1).view(torch.uint8).numpy().data if row.numel() else memoryview(b"")
    file.seek(start)
    if file.readinto(memory) != len(memory):
        return False
    if not is_direct:
        row.copy_(target)
    return True
