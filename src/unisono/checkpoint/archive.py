"""The zip files of `torch.save`: whether one is what it seems to be, before it is read.

What a zip file holds is written in several places. Where these contradict each other, two readers
see different records, and one may unpack to far more than the file. `torch.save` writes all of
them in one way, so nothing else is read.

Reference: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.14 to 4.3.16
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Final

from torch import Tensor

BEGIN: Final = b"PK\3\4"
_SIGN: Final = b"PK\5\6"
_SIGN_64: Final = b"PK\6\6"
_SIGN_OF_LOCATOR: Final = b"PK\6\7"
_CONSTANTS: Final = "constants.pkl"  # by this `torch.load` tells a program from tensors
_HEADER: Final = struct.Struct("<26x2H")  # of a record: lengths of its name and extra field
_END: Final = struct.Struct("<4s4H2LH")  # sign, disks, counts, size and offset of the directory
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR: Final = struct.Struct("<4sLQL")  # sign, disk, where the end of 64 bits is, disks


def is_archive(path: Path) -> bool:
    """Whether `torch.load` takes the file for a zip file; otherwise it is of the older format."""
    with path.open("rb") as file:
        return file.read(len(BEGIN)) == BEGIN


def open_archive(file: BinaryIO) -> zipfile.ZipFile:
    """A zip file, after it has been found to be built as `torch.save` does it.

    Args:
        file: Open for reading, and to be closed by the caller.

    Raises:
        OSError: If it can't be read.
        ValueError: If it is built in another way, or records are compressed.
        zipfile.BadZipFile: If it is damaged.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - _END.size - _LOCATOR.size - _END_64.size))
    check_end(file.read(), size)
    archive = zipfile.ZipFile(file)
    records = archive.infolist()
    if any(record.filename.partition("/")[2] == _CONSTANTS for record in records):
        raise ValueError("it is a program of TorchScript, which holds code")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
            raise ValueError(
                f"{record.filename!r:.100} in it is compressed, {record.file_size:,} bytes"
                f" unpacked; torch.save stores plain bytes"
            )
    total = sum(record.file_size for record in records)
    if total > size:
        raise ValueError(f"its records have {total:,} bytes together, the file has {size:,}")
    counts = Counter(record.filename for record in records)
    name, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise ValueError(f"{name!r:.100} is in it {count} times")
    return archive


def start_of(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where the content of a record begins in the file.

    Raises:
        ValueError: If no record is where the directory says.
    """
    if record.header_offset < 0:
        raise ValueError(f"{record.filename!r:.100} in it begins before the file")
    file.seek(record.header_offset)
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(BEGIN):
        raise ValueError(f"{record.filename!r:.100} in it is not where its directory says")
    name, extra = _HEADER.unpack(header)
    return int(record.header_offset + _HEADER.size + name + extra)


def check_end(tail: bytes, size: int) -> tuple[int, int, int]:
    """Raise unless the directory of the records ends where its description begins.

    Args:
        tail: The last bytes of the file.
        size: The size of the file.

    Returns:
        Where the directory begins, its bytes, and the number of records.

    Raises:
        ValueError: If it isn't so.
    """
    end = len(tail) - _END.size
    if end < 0 or tail[end : end + 4] != _SIGN:
        raise ValueError("it was cut off, or has something behind its end")
    *_, count, length, start, comment = _END.unpack_from(tail, end)
    locator, limits = end - _LOCATOR.size, (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    if tail[max(0, locator) : locator + 4] == _SIGN_OF_LOCATOR:
        _, _, place, _ = _LOCATOR.unpack_from(tail, locator)
        end = locator - _END_64.size
        if end < 0 or place != size - len(tail) + end or tail[end : end + 4] != _SIGN_64:
            raise ValueError("the end of its directory is not where it says")
        small, (*_, count, length, start) = (count, length, start), _END_64.unpack_from(tail, end)
        wide = (count, length, start)
        if any(s not in (w, limit) for s, w, limit in zip(small, wide, limits, strict=True)):
            raise ValueError("the two ends of its directory contradict each other")
    if start + length != size - len(tail) + end or comment:
        raise ValueError("its directory is not where it says")
    return start, length, count


def check_storages(path: Path, tensors: Iterable[Tensor]) -> None:
    """Raise unless the memory of tensors is whole records of a file.

    `torch.load` takes the size of what it maps from the pickle, and where that says too much, it
    gives what lies behind.

    Args:
        path: A zip file.
        tensors: What ``torch.load(path, mmap=True)`` gave, dense ones on the CPU.

    Raises:
        ValueError: If they lie elsewhere.
    """
    with path.open("rb") as file:
        records = open_archive(file).infolist()
        sizes = {start_of(file, record): record.file_size for record in records}
    storages = [tensor.untyped_storage() for tensor in tensors]
    found = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}
    lowest = min(found, default=0)
    # Where the map of the file begins isn't told: it is where all of them are whole records.
    if found and not any(
        all(sizes.get(start + place - lowest) == nbytes for place, nbytes in found.items())
        for start in sizes
    ):
        raise ValueError("a tensor in it is larger or smaller than the record that is to hold it")
