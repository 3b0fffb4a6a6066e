"""The files of a folder, and the pieces that they are predicted in.

A piece is a file, or a range of the row groups of a large Parquet file. Where a file is cut follows
from the file alone, not from who predicts it: the same rows meet in a batch whatever the number of
processes, so results are the same to the last bit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from unisono.commands.outcome import ArgumentError
from unisono.commands.table_files import SUFFIXES, is_table, read_row_groups

PIECE_ROWS: Final = 1 << 18  # a second or two of work: that is what a kill costs
_TAIL: Final = 1 << 16  # bytes at the end of a file that are compared
_BYTES_OF_ROW: Final = 100  # of CSV, roughly; only for the order of the work


@dataclass(frozen=True)
class Piece:
    """Rows of a file that are predicted in one go.

    Args:
        groups: The first of its row groups, and the one after its last; None for the whole file.
        rows: How many rows; None if that isn't known, as in CSV.
        rows_before: How many rows of the file come before.
    """

    groups: tuple[int, int] | None
    rows: int | None
    rows_before: int = 0


@dataclass(frozen=True)
class Identity:
    """What tells a file from one of the same name with other rows.

    Args:
        size: In bytes.
        modified: Time of the last change, in nanoseconds.
        tail: SHA-256 of its end; in Parquet the statistics of all columns are there.
    """

    size: int
    modified: int
    tail: str


@dataclass(frozen=True)
class InputFile:
    """A file to predict.

    Args:
        name: Its path in the folder, with slashes.
        identity: Which file it is; None if it can't be read.
        pieces: What it is cut into; none if it can't be read.
        fault: Why it can't be read.
    """

    name: str
    identity: Identity | None
    pieces: tuple[Piece, ...]
    fault: str = ""

    def to_json(self) -> dict[str, Any]:
        """The file as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> InputFile:
        """Make a file of what `to_json` gave."""
        pieces = tuple(
            Piece(None if own["groups"] is None else tuple(own["groups"]), own["rows"], before)
            for own in values["pieces"]
            for before in [own["rows_before"]]
        )
        known = values["identity"]
        identity = None if known is None else Identity(**known)
        return cls(values["name"], identity, pieces, values["fault"])


def list_tables(folder: Path) -> tuple[list[str], list[str]]:
    """The files below a folder that are tables, and the others; each sorted.

    Names that begin with a dot or an underscore are passed over, folders too: that is how Spark,
    Arrow and others mark what is no data.

    Raises:
        ArgumentError: If a folder can't be read.
    """
    tables: list[str] = []
    others: list[str] = []

    def fail(error: OSError) -> None:
        raise ArgumentError(f"can't read {error.filename}: {error.strerror}") from error

    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        for name in names:
            if not name.startswith((".", "_")):
                path = Path(where, name).relative_to(folder).as_posix()
                (tables if is_table(name) else others).append(path)
    if not tables:
        raise ArgumentError(f"--input {folder} has no file that ends in {' or '.join(SUFFIXES)}")
    return sorted(tables), sorted(others)


def read_file(folder: Path, name: str, piece_rows: int) -> InputFile:
    """Find out what a file is, without reading its rows.

    Args:
        folder: Where it is.
        name: Its path in there.
        piece_rows: Rows of a piece, at least.
    """
    path = folder / name
    try:
        identity = identify(path)
        is_csv = path.suffix.lower() == ".csv"
        pieces = (Piece(None, None),) if is_csv else tuple(cut(read_row_groups(path), piece_rows))
    except ArgumentError as error:
        return InputFile(name, None, (), str(error))
    return InputFile(name, identity, pieces)


def identify(path: Path) -> Identity:
    """Look at a file on disk.

    Raises:
        ArgumentError: If it can't be read.
    """
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            file.seek(max(0, about.st_size - _TAIL))
            tail = hashlib.sha256(file.read(_TAIL)).hexdigest()
    except OSError as error:
        raise ArgumentError(f"can't read {path}: {error.strerror}") from error
    return Identity(about.st_size, about.st_mtime_ns, tail)


def cut(rows: Sequence[int], least: int) -> Iterator[Piece]:
    """Cut a Parquet file between its row groups.

    Args:
        rows: Number of rows in each group.
        least: Rows of a piece, at least; the last one may have fewer.

    Example:
        >>> [piece.groups for piece in cut([40, 40, 40, 90, 10], 80)]
        [(0, 2), (2, 4), (4, 5)]
    """
    start, before, size = 0, 0, 0
    for k, own in enumerate(rows):
        size += own
        if size >= least:
            yield Piece((start, k + 1), size, before)
            start, before, size = k + 1, before + size, 0
    if start < len(rows) or not rows:
        yield Piece((start, len(rows)), size, before)


def order_of_work(files: Sequence[InputFile]) -> list[tuple[int, int]]:
    """All pieces, as index of the file and of the piece in it; the largest first.

    Who takes the next one whenever he is done is then done when the others are, but for one of
    the smallest pieces.
    """

    def weight(file: InputFile, piece: Piece) -> int:
        if piece.rows is not None:
            return piece.rows
        return 0 if file.identity is None else file.identity.size // _BYTES_OF_ROW

    every = [(k, j) for k, file in enumerate(files) for j in range(len(file.pieces))]
    return sorted(every, key=lambda at: -weight(files[at[0]], files[at[0]].pieces[at[1]]))
