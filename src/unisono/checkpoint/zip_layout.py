"""Files of `torch.save` that differ in the values of their tensors alone."""

from __future__ import annotations

import io
import struct
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from unisono.checkpoint.archive import (
    BEGIN,
    check_end,
    open_archive,
    start_of,
)

_PICKLE: Final = "data.pkl"
_ORDER: Final = "byteorder"
_STORAGES: Final = "data/"
_SIGN: Final = b"PK\1\2"
# Of an entry of the directory: its sign, method, packed and unpacked size, the lengths of name,
# extra field and comment, and where the record begins. Of a record: the first two lengths.
_ENTRY: Final = struct.Struct("<4s6xH8x2L3H8xL")
_HEADER: Final = struct.Struct("<26x2H")
_EXTRA: Final = 64  # bytes that an entry may have beside its name, and the folder in front of it
_ENDS: Final = 98  # bytes behind the directory
# What looking at a damaged zip file may raise. The usual way then says what is wrong with it.
_NO_ZIP: Final = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError),
    *(ValueError, KeyError, EOFError, struct.error),
)


@dataclass(frozen=True)
class ZipLayout:
    """Files of `torch.save` that hold one and the same pickle.

    https://docs.pytorch.org/docs/stable/notes/serialization.html: a zip file with ``data.pkl``
    and one uncompressed record ``data/KEY`` for each storage.

    Args:
        records: Name, without the folder that all are in, and bytes of each record, in order.
        same: Number of a record that is equal in all files -> its content.
        places: Name of a tensor -> the number of its record, and where it begins there.
    """

    records: Sequence[tuple[bytes, int]]
    same: Mapping[int, bytes]
    places: Mapping[str, tuple[int, int]]

    def find(self, file: FileIO) -> Mapping[str, int] | None:
        """Where the tensors of a file begin; None if it isn't alike."""
        try:
            starts = _starts(file, self.records)
        except (ValueError, struct.error):
            return None
        if starts is None:
            return None
        for k, content in self.same.items():
            file.seek(starts[k])
            if file.read(len(content)) != content:
                return None
        return {name: starts[k] + offset for name, (k, offset) in self.places.items()}


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
            infos = archive.infolist()
            names = [info.filename.partition("/")[2] for info in infos]
            starts = {k: start_of(file, infos[k]) for k, n in enumerate(names) if _is_storage(n)}
            pickle = [k for k, name in enumerate(names) if name in (_PICKLE, _ORDER)]
            same = {k: archive.read(infos[k]) for k in pickle}
        except _NO_ZIP:  # torch itself compares no checksums
            return None
    if any(names[k] == _ORDER and own.decode() != sys.byteorder for k, own in same.items()):
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
    records = [(name.encode(), info.file_size) for name, info in zip(names, infos, strict=True)]
    return ZipLayout(records, same, places)


def _starts(file: FileIO, records: Sequence[tuple[bytes, int]]) -> list[int] | None:
    """Where the contents of these records begin in a file; None if it has others.

    Looking at what is expected takes a tenth of the time of finding out what there is.

    Raises:
        ValueError: If the end of the file was damaged.
        struct.error: If it is too short.
    """
    size = file.seek(0, io.SEEK_END)
    room = _ENDS + sum(_ENTRY.size + len(name) + _EXTRA for name, _ in records)
    file.seek(max(0, size - room))
    tail = file.read()
    begin, _, count = check_end(tail, size)
    place, folder = begin - size + len(tail), None
    if count != len(records) or place < 0:
        return None
    starts = []
    for name, nbytes in records:
        *found, length, extra, comment, at = _ENTRY.unpack_from(tail, place)
        full = tail[place + _ENTRY.size :][:length]
        folder = full[: length - len(name)] if folder is None else folder
        if found != [_SIGN, zipfile.ZIP_STORED, nbytes, nbytes] or full != folder + name:
            return None
        file.seek(at)
        header = file.read(_HEADER.size + length)
        if not header.startswith(BEGIN) or header[_HEADER.size :] != full:
            return None
        starts.append(at + len(header) + _HEADER.unpack_from(header)[1])
        place += _ENTRY.size + length + extra + comment
    return starts


def _is_storage(name: str) -> bool:
    return name.startswith(_STORAGES)


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
