"""The zip files of `torch.save`: whether one is what it seems to be, before it is read.

What a zip file holds is written in several places. Where these contradict each other, two readers
see different records, and one may unpack to far more than the file. `torch.save` writes all of
them in one way, so nothing else is read.

Reference: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.14 to 4.3.16
"""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Final

_BEGIN: Final = b"PK\3\4"
_SIGN: Final = b"PK\5\6"
_SIGN_64: Final = b"PK\6\6"
_SIGN_OF_LOCATOR: Final = b"PK\6\7"
_END: Final = struct.Struct("<4s4H2LH")  # sign, disks, counts, size and offset of the directory
_END_64: Final = struct.Struct("<4sQ2H2L4Q")
_LOCATOR: Final = struct.Struct("<4sLQL")  # sign, disk, where the end of 64 bits is, disks


def is_archive(path: Path) -> bool:
    """Whether `torch.load` takes the file for a zip file; otherwise it is of the older format."""
    with path.open("rb") as file:
        return file.read(len(_BEGIN)) == _BEGIN


def check_archive(path: Path) -> None:
    """Raise unless a zip file is built as `torch.save` does it.

    Args:
        path: A zip file.

    Raises:
        OSError: If it can't be read.
        ValueError: If it is built in another way, or records are compressed.
        zipfile.BadZipFile: If it is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _END.size - _LOCATOR.size - _END_64.size))
        _check_end(file.read(), size)
        file.seek(0)
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
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


def _check_end(tail: bytes, size: int) -> None:
    """Raise unless the directory of the records ends where its description begins.

    Args:
        tail: The last bytes of the file.
        size: The size of the file.
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
