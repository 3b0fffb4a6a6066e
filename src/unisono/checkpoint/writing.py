"""Tensors and plain facts to one safetensors file, written whole or not at all.

https://huggingface.co/docs/safetensors describes the format. It is written here, and read by the
library of that name: the library wants all tensors on the host at once, which a large ensemble
on a GPU doesn't have room for. This writes one after another.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection, Mapping
from typing import IO, Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from unisono.checkpoint.dtypes import CODES, name_if_bytes, to_stored
from unisono.checkpoint.strides import noted_strides
from unisono.files import replacing

Crcs: TypeAlias = np.ndarray[Any, np.dtype[np.uint32]]

KEY: Final = "unisono"
CRC: Final = "unisono.crc32"
# A header larger than this is no header: reading it would take memory that no tensor explains.
MAX_HEADER: Final = 16 * 2**20
_LENGTH: Final = 8  # bytes in front that hold the length of the header
_ALIGNMENT: Final = 64  # of the first tensor, in bytes; the format itself asks for 8
_CHUNK: Final = 2**24


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    facts: Any,
    *,
    stacked: Collection[str] = (),
) -> None:
    """Replace the file by one with these tensors and facts, as a whole or not at all.

    Args:
        path: The file.
        tensors: By name.
        facts: What JSON can hold.
        stacked: Names of the tensors that carry the member axis: their members can be checked
            one by one.

    Raises:
        OSError: If the disk refuses; a file that was there before is as it was.
        TypeError: If a tensor can't be stored; likewise.
        ValueError: If the facts are too long; likewise.
    """
    _refuse_what_cannot_be_stored(tensors)
    # Larger elements first, so that each starts at a multiple of its size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    notes = {
        "facts": facts,
        "stacked": sorted(stacked),
        "strides": {n: s for n in names if (s := noted_strides(tensors[n])) is not None},
        "dtypes": {n: d for n in names if (d := name_if_bytes(tensors[n].dtype)) is not None},
    }
    count = max((len(tensors[name]) for name in stacked), default=0)
    checks = Checks(names, stacked, count)
    with replacing(path) as new, open(new, "wb") as file:
        header = _header(names, tensors, notes, checks)
        if len(header) > MAX_HEADER:
            raise ValueError(
                f"{os.fspath(path)}: names and facts take {len(header):,} bytes, a file has room"
                f" for {MAX_HEADER:,}"
            )
        file.write(header)
        for name in names:
            _write_tensor(file, name, tensors[name], checks)
        # The checksums have a fixed length, so the header is as long as before.
        file.seek(0)
        file.write(_header(names, tensors, notes, checks))


class Checks:
    """CRC-32 of every tensor and of every member, to find a damaged one and say which.

    Both are made of the checksums of single rows: that of a tensor runs over those of its rows,
    that of a member over those of its row in each stacked tensor, in the file's order.

    Args:
        names: All tensors, in the file's order.
        stacked: Those with a member axis.
        count: The number of members.
    """

    def __init__(self, names: Collection[str], stacked: Collection[str], count: int) -> None:
        self.stacked = frozenset(stacked)
        self.tensors = dict.fromkeys(names, 0)
        self.members = np.zeros(count, np.uint32)

    def add(self, name: str, rows: Crcs) -> None:
        """Take up the checksums of the rows of one tensor, or the one of a whole tensor."""
        self.tensors[name] = of_rows(rows)
        if name in self.stacked:
            self.members = chain(self.members, rows)

    def to_json(self) -> dict[str, Any]:
        """As text of a length that doesn't depend on the values."""
        return {
            "tensors": {name: f"{value:08x}" for name, value in self.tensors.items()},
            "members": self.members.astype(">u4").tobytes().hex(),
        }


def chain(before: Crcs, rows: Crcs) -> Crcs:
    """The members' checksums after one more tensor: CRC-32 of its rows' behind those before."""
    pairs = zip(before.tolist(), rows.tolist(), strict=True)
    return np.array([zlib.crc32(row.to_bytes(4, "little"), crc) for crc, row in pairs], np.uint32)


def of_rows(rows: Crcs) -> int:
    """The checksum of a tensor, made of those of its rows."""
    return zlib.crc32(rows.astype("<u4").tobytes())


def row_checks(stored: Tensor, *, stacked: bool) -> Crcs:
    """CRC-32 of each row of a tensor as it stands in the file, or of the whole of it.

    Shape:
        - returns: (N) if stacked, else (1)
    """
    data = as_bytes(stored)
    rows = len(stored) if stacked else 1
    size = len(data) // max(rows, 1)
    return np.array(
        [zlib.crc32(data[k * size : (k + 1) * size]) for k in range(rows)], dtype=np.uint32
    )


def as_bytes(stored: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    if stored.numel() == 0:
        return memoryview(b"")
    flat = stored.reshape(-1)
    return flat.view(torch.uint8).numpy().data


def digest(listing: Any, text: str) -> str:
    """CRC-32 of what the file says of its tensors, and of the facts."""
    return f"{zlib.crc32(text.encode(), zlib.crc32(json.dumps(listing).encode())):08x}"


def _write_tensor(file: IO[bytes], name: str, tensor: Tensor, checks: Checks) -> None:
    stored = to_stored(tensor)
    checks.add(name, row_checks(stored, stacked=name in checks.stacked))
    data = as_bytes(stored)
    for start in range(0, len(data), _CHUNK):  # so that ctrl-C is heard
        file.write(data[start : start + _CHUNK])


def _header(
    names: list[str], tensors: Mapping[str, Tensor], notes: Mapping[str, Any], checks: Checks
) -> bytes:
    entries, at = {}, 0
    for name in names:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.dtype.itemsize
        code = CODES.get(tensor.dtype)
        shape = [*tensor.shape] if code else [*tensor.shape, tensor.dtype.itemsize]
        entries[name] = {"dtype": code or "U8", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps({**notes, "checks": checks.to_json()})
    listing = sorted([name, entry["dtype"], entry["shape"]] for name, entry in entries.items())
    metadata = {"format": "pt", KEY: text, CRC: digest(listing, text)}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-(_LENGTH + len(header)) % _ALIGNMENT)
    return len(header).to_bytes(_LENGTH, "little") + header


def _refuse_what_cannot_be_stored(tensors: Mapping[str, Tensor]) -> None:
    problems = []
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            problems.append(f"`{name}` is a {tensor.layout} tensor; convert it with .to_dense()")
        elif tensor.is_meta:
            problems.append(f"`{name}` is on the meta device and has no values")
        else:
            try:
                name_if_bytes(tensor.dtype)
            except TypeError as error:
                problems.append(f"`{name}`: {error}")
    if problems:
        raise TypeError("can't be saved: " + "; ".join(problems))
