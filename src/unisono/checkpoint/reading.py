"""Reading safetensors files: what isn't one, is cut off or damaged is found, and told by name.

Nothing in a file is run. The library `safetensors` checks that the tensors fill the file; what
`unisono` itself wrote has checksums, too.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unisono.checkpoint.dtypes import DTYPES, dtype_of_bytes, from_stored
from unisono.checkpoint.row_reading import RowReader
from unisono.checkpoint.strides import strides_of_rows
from unisono.checkpoint.writing import (
    CRC,
    KEY,
    MAX_HEADER,
    Crcs,
    chain,
    digest,
    of_rows,
    row_checks,
)
from unisono.errors import CheckpointError

_THREADS: Final = 4
_CHUNK: Final = 2**22  # bytes that a thread reads, checks and copies at once: they fit its cache
# What broken content can raise: it is data, so any of these means that the file is at fault.
_BROKEN: Final = (
    *(SafetensorError, ValueError, KeyError, TypeError, IndexError, RuntimeError, EOFError),
)


@dataclass(frozen=True)
class Entry:
    """What a file says of one tensor: its dtype, shape, and strides where they were kept."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """The size of its elements together, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file that is open for reading; `open_file` makes it.

    Args:
        name: The file, for messages.
        what: What it should be, for messages.
    """

    def __init__(self, name: str, what: str) -> None:
        self.name = name
        self.what = what
        self.facts: Any = None
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._handle: Any = None
        self._raw: Any = None
        self._reader: RowReader | None = None
        self._checks: dict[str, int] = {}
        self.member_checks: Crcs = np.zeros(0, np.uint32)  # (N), of each member's values
        self.stacked: frozenset[str] = frozenset()

    def take(self, handle: Any, raw: FileIO) -> None:
        """Look at the header of what the library has opened, and we as well."""
        self._handle, self._raw = handle, raw
        self.entries = {key: _entry(handle.get_slice(key)) for key in handle.keys()}
        self.metadata = dict(handle.metadata() or {})
        if KEY in self.metadata:
            self._take_notes()

    def map(self, key: str) -> Tensor:
        """The tensor in the memory of the file: pages are read when they are looked at."""
        with self.making_sense():
            return from_stored(self._handle.get_tensor(key), self.entries[key].dtype)

    def read(self, key: str, device: torch.device | None = None) -> Tensor:
        """The whole tensor, copied and checked, with the strides it had."""
        entry = self.entries[key]
        out = self._empty(key, len_of(entry), device)
        crcs = self._copy_rows(key, out, None)
        if self._checks and of_rows(crcs) != self._checks[key]:
            raise self.broken(f"the values of `{key}` are not those that were saved")
        return out

    def read_stacked(
        self,
        members: Sequence[int] | None,
        device_of: Callable[[str], torch.device],
    ) -> Iterator[tuple[str, Tensor]]:
        """Read the tensors with a member axis, in the file's order; only these members of them.

        Args:
            members: The members to read; None for all.
            device_of: Where each tensor is to lie.

        Yields:
            Name and tensor.

        Raises:
            CheckpointError: When a damaged one has been read; with a list of members after the
                last, since a member's checksum runs over its rows in all of them.
        """
        if not self.stacked:
            return
        if members is not None and RowReader.is_possible():
            with self.making_sense():
                self._reader = RowReader(self._raw)
        try:
            yield from self._read_stacked(members, device_of)
        finally:
            self._reader = None

    def _read_stacked(
        self, members: Sequence[int] | None, device_of: Callable[[str], torch.device]
    ) -> Iterator[tuple[str, Tensor]]:
        count = len(self.member_checks) if members is None else len(members)
        found = np.zeros(count, np.uint32)
        for key in (key for key in self.in_order() if key in self.stacked):
            out = self._empty(key, count, device_of(key))
            crcs = self._copy_rows(key, out, members)
            found = chain(found, crcs)
            if members is None and of_rows(crcs) != self._checks.get(key):
                raise self.broken(f"the values of `{key}` are not those that were saved")
            yield key, out
        expected = self.member_checks if members is None else self.member_checks[list(members)]
        bad = np.flatnonzero(found != expected).tolist()
        if bad:
            at = bad if members is None else [members[k] for k in bad]
            raise self.broken(f"the values of members {at} are not those that were saved")

    @property
    def has_checks(self) -> bool:
        """Whether the file says what its values are to be."""
        return bool(self._checks)

    def check(self, rows: Mapping[str, Crcs]) -> None:
        """Compare all that was read with what was saved.

        Args:
            rows: `writing.row_checks` of every tensor.

        Raises:
            CheckpointError: If anything is damaged; it names all such tensors and members.
        """
        if not self.has_checks:
            return
        found = np.zeros(len(self.member_checks), np.uint32)
        for key in (key for key in self.in_order() if key in self.stacked):
            found = chain(found, rows[key])
        names = [f"`{key}`" for key in self.in_order() if of_rows(rows[key]) != self._checks[key]]
        members = np.flatnonzero(found != self.member_checks).tolist()
        if names or members:
            what = [", ".join(names)] if names else []
            what += [f"members {members}"] if members else []
            raise self.broken(f"the values of {' in '.join(what)} are not those that were saved")

    @contextmanager
    def making_sense(self) -> Iterator[None]:
        """Tell what goes wrong in the block as a fault of the file: it looks at facts only."""
        try:
            yield
        except CheckpointError:
            raise
        except RecursionError as error:
            raise self.broken("its facts are nested too deeply") from error
        except _BROKEN as error:
            raise self.broken(_told(error)) from error

    def broken(self, what: str) -> CheckpointError:
        """The error about content of this file."""
        return CheckpointError(f"{self.name} isn't {self.what}: {what}")

    def in_order(self) -> list[str]:
        """The tensors as they lie in a file of `unisono`."""
        return sorted(self.entries, key=lambda k: (-self.entries[k].dtype.itemsize, k))

    def _empty(self, key: str, rows: int, device: torch.device | None) -> Tensor:
        entry = self.entries[key]
        shape = (rows, *entry.shape[1:]) if entry.shape else ()
        with self.making_sense():
            strides = strides_of_rows(entry.shape, entry.strides, rows)
        return torch.empty_strided(shape, strides, dtype=entry.dtype, device=device or "cpu")

    def _copy_rows(self, key: str, out: Tensor, members: Sequence[int] | None) -> Crcs:
        """Copy a tensor, or its rows, and return the checksums of what was read."""
        if key not in self.stacked:
            source = self.map(key)
            out.copy_(source)
            return row_checks(source, stacked=False)
        rows = range(len_of(self.entries[key])) if members is None else members
        step = max(1, _CHUNK // max(1, math.prod(out.shape[1:]) * out.itemsize))

        def copy(start: int) -> Crcs:
            taken = self._rows(key, rows[start : start + step])
            crcs = row_checks(taken, stacked=True)
            out[start : start + step].copy_(taken)
            return crcs

        starts = range(0, len(rows), step)
        if len(starts) <= 1:
            return np.concatenate([np.zeros(0, np.uint32), *map(copy, starts)])
        with ThreadPoolExecutor(_THREADS) as threads:
            return np.concatenate(list(threads.map(copy, starts)))

    def _rows(self, key: str, rows: Sequence[int]) -> Tensor:
        """These rows of a tensor; those of a range lie in the memory of the file."""
        if self._reader is not None:
            entry = self.entries[key]
            with self.making_sense():
                return self._reader.read(key, entry.shape, entry.dtype, rows)
        source = self.map(key)
        return source[rows.start : rows.stop] if isinstance(rows, range) else source[list(rows)]

    def _take_notes(self) -> None:
        text = self.metadata[KEY]
        listing = [self._listed(key) for key in sorted(self.entries)]
        if self.metadata.get(CRC) != digest(listing, text):
            raise self.broken("its header is not the one that was saved")
        notes = json.loads(text)
        self.facts = notes["facts"]
        for key, name in dict(notes["dtypes"]).items():
            shape = self.entries[key].shape[:-1]
            self.entries[key] = Entry(dtype_of_bytes(name), shape)
        for key, strides in dict(notes["strides"]).items():
            entry = self.entries[key]
            self.entries[key] = Entry(entry.dtype, entry.shape, tuple(map(int, strides)))
        checks = notes["checks"]
        self._checks = {key: int(checks["tensors"][key], 16) for key in self.entries}
        members = np.frombuffer(bytes.fromhex(checks["members"]), ">u4")
        self.member_checks = members.astype(np.uint32)
        self.stacked = frozenset(notes["stacked"])
        for key in sorted(self.stacked):
            if self.entries[key].shape[:1] != members.shape:
                shape = self.entries[key].shape
                raise ValueError(f"`{key}` of shape {shape} is stacked, of {len(members)} members")

    def _listed(self, key: str) -> list[Any]:
        entry = self._handle.get_slice(key)
        return [key, entry.get_dtype(), list(entry.get_shape())]


@contextmanager
def open_file(path: str | os.PathLike[str], *, what: str) -> Iterator[TensorFile]:
    """Open a safetensors file.

    Args:
        path: The file.
        what: What it should be, for messages, such as "an ensemble of unisono".

    Yields:
        The open file. What it maps into memory stays valid afterwards.

    Raises:
        OSError: If it can't be read.
        CheckpointError: If it is something else, or damaged.
    """
    name = os.fspath(path)
    _check_header_length(Path(path), what)
    file = TensorFile(name, what)
    with ExitStack() as stack:
        with file.making_sense():
            file.take(*_open(Path(path), stack))
        yield file


def _open(path: Path, stack: ExitStack) -> tuple[Any, FileIO]:
    """The file as the library opens it, and as it is: both are one, whoever replaces it meanwhile.

    The library opens it twice, by its name.
    """
    while True:
        with ExitStack() as opened:
            before = _identity(path)
            try:
                raw = opened.enter_context(path.open("rb", buffering=0))
                handle = opened.enter_context(safe_open(path, framework="pt"))
            except Exception:
                if _identity(path) == before:
                    raise
                continue
            if _identity(path) == before:
                stack.enter_context(opened.pop_all())
                return handle, raw


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read(path: str | os.PathLike[str], *, what: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors, on the CPU, and the facts of a file that `writing.write` made.

    Args:
        path: The file.
        what: What it should be, for messages.

    Raises:
        OSError: If it can't be read.
        CheckpointError: If it is something else, or damaged.
    """
    with open_file(path, what=what) as file:
        if file.facts is None:
            raise file.broken("it holds no facts of unisono")
        return {key: file.read(key) for key in file.entries}, file.facts


def len_of(entry: Entry) -> int:
    """Length of axis 0; 1 for a tensor without axes."""
    return entry.shape[0] if entry.shape else 1


def check_is_file(path: Path, what: str) -> None:
    """Raise unless a plain file is there: a pipe may never open, and a device never end.

    Raises:
        OSError: If nothing is there.
        CheckpointError: If it is anything else.
    """
    mode = path.stat().st_mode  # tells of a missing file in Python's own words
    if stat.S_ISDIR(mode):
        raise CheckpointError(f"{path} isn't {what}: it is a folder; name a file in it")
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path} isn't {what}: it is a pipe or a device, not a file")


def _check_header_length(path: Path, what: str) -> None:
    """Raise before anything of a file with too long a header is read."""
    check_is_file(path, what)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if length > size:
        raise CheckpointError(
            f"{path} isn't {what}: no safetensors file begins like this, or it was cut off"
            f" after {size:,} bytes"
        )
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path} isn't {what}: its header has {length:,} bytes, the largest that is read has"
            f" {MAX_HEADER:,}"
        )


def _entry(found: Any) -> Entry:
    code = found.get_dtype()
    if code not in DTYPES:
        raise ValueError(f"dtype {code} is unknown")
    return Entry(DTYPES[code], tuple(found.get_shape()))


def _told(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error) or repr(error)
