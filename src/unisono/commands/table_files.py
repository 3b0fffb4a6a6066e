"""Reading tables: CSV and Parquet, whole for training, in batches of rows for prediction."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

from unisono.commands.columns import Column, list_names
from unisono.commands.csv_files import check_names, open_csv, read_all, read_batches, read_header
from unisono.commands.features import wrong_types
from unisono.commands.outcome import ArgumentError
from unisono.extras import require

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema, Table
    from pyarrow.parquet import ParquetFile

SUFFIXES: Final = (".csv", ".parquet")
STANDARD: Final = "-"  # standard input or output, as CSV

# Values in memory at a time: a table of many columns is read in batches of fewer rows.
_CELLS: Final = 1 << 20
_MOST_ROWS: Final = 1 << 16


def is_table(name: str) -> bool:
    """Say whether a name is that of a table's file.

    Example:
        >>> is_table("cars.CSV"), is_table("digits")
        (True, False)
    """
    return Path(name).suffix.lower() in SUFFIXES


def read_table(path: Path) -> Table:
    """Read a whole table.

    Args:
        path: A file that ends in .csv or .parquet.

    Returns:
        A table with at least one row and no two columns of one name. The types of the columns
        of a CSV file are found from all their values.

    Raises:
        ArgumentError: If the file can't be read, or has no rows.
    """
    pa = require("pyarrow", extra="tables", purpose="a table")
    with _open_file(path) as file:
        if _is_csv(path):
            table = read_all(path, file)
        else:
            import pyarrow.parquet as pq

            try:
                table = pq.read_table(file)
            except (pa.ArrowException, OSError) as error:
                raise _not_parquet(path, error) from error
    check_names(path, table.column_names)
    if not len(table):
        raise ArgumentError(f"{path} has no rows")
    return table


def from_parquet(content: bytes) -> Table:
    """Read a table from the content of a Parquet file.

    Raises:
        ValueError: If it isn't one.
    """
    pa = require("pyarrow", extra="tables", purpose="a table")
    import pyarrow.parquet as pq

    try:
        return pq.read_table(io.BytesIO(content))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a Parquet file: {error}") from error


def to_parquet(table: Table) -> bytes:
    """Return the content of a Parquet file that holds the table."""
    import pyarrow.parquet as pq

    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()


@dataclass(frozen=True, eq=False)
class Rows:
    """An open file of rows.

    Args:
        schema: The columns that the batches have.
        total: How many rows there are; None if that isn't known before the end.
        batches: The rows in order, so many at a time that memory stays bounded.
    """

    schema: Schema
    total: int | None
    batches: Iterator[RecordBatch]


@contextlib.contextmanager
def open_rows(
    path: str,
    columns: Sequence[Column],
    keep: Sequence[str] | None,
    *,
    groups: range | None = None,
    most_rows: int = _MOST_ROWS,
) -> Iterator[Rows]:
    """Open a table for reading in batches.

    Args:
        path: A file, or ``-`` for CSV from standard input.
        columns: The features, which must be there and of the right types.
        keep: Other columns to read; None for all of them.
        groups: The row groups of a Parquet file to read, which may have no rows; None for the
            whole file.
        most_rows: Rows in a batch, at most.

    Raises:
        ArgumentError: If the file can't be read, has no rows or lacks a column; while reading
            the batches too, if a value isn't of its column's type.
    """
    require("pyarrow", extra="tables", purpose="a table")
    if path == STANDARD:
        yield _rows_of_csv(Path("standard input"), sys.stdin.buffer, columns, keep, most_rows)
        return
    where = Path(path)
    with _open_file(where) as file:
        if _is_csv(where):
            yield _rows_of_csv(where, file, columns, keep, most_rows)
        else:
            yield _rows_of_parquet(where, file, columns, keep, groups, most_rows)


def read_row_groups(path: Path) -> list[int]:
    """The number of rows of each row group of a Parquet file.

    Raises:
        ArgumentError: If the file can't be read.
    """
    with _open_file(path) as file:
        metadata = _open_parquet(path, file).metadata
        return [metadata.row_group(k).num_rows for k in range(metadata.num_row_groups)]


def _rows_of_csv(
    where: Path,
    file: BinaryIO,
    columns: Sequence[Column],
    keep: Sequence[str] | None,
    most_rows: int,
) -> Rows:
    names = read_header(where, file)
    wanted = _wanted(where, names, columns, keep)
    reader = open_csv(where, file, names, columns=columns, wanted=wanted)
    blocks = read_batches(where, reader, names, columns=columns, wanted=wanted)
    return Rows(reader.schema, None, _split(blocks, _rows_at_a_time(wanted, most_rows)))


def _rows_of_parquet(
    where: Path,
    file: BinaryIO,
    columns: Sequence[Column],
    keep: Sequence[str] | None,
    groups: range | None,
    most_rows: int,
) -> Rows:
    import pyarrow as pa

    source = _open_parquet(where, file)
    schema = source.schema_arrow
    wanted = _wanted(where, schema.names, columns, keep)
    wrong = wrong_types(schema, columns)
    if wrong:
        raise ArgumentError(f"{where}: {'; '.join(wrong)}")
    about = source.metadata
    if groups is None and not about.num_rows:
        raise ArgumentError(f"{where} has no rows")
    chosen_groups = range(about.num_row_groups) if groups is None else groups
    total = sum(about.row_group(k).num_rows for k in chosen_groups)
    chosen = pa.schema([schema.field(name) for name in wanted])
    rows = _rows_at_a_time(wanted, most_rows)
    batches = _batches_of_parquet(where, source, chosen_groups, wanted, rows)
    return Rows(chosen, total, batches if total else iter(()))


def _open_parquet(where: Path, file: BinaryIO) -> ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Unbuffered, it would read a row group at once, which may be the whole file.
        return pq.ParquetFile(file, buffer_size=1 << 16, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise _not_parquet(where, error) from error


def _batches_of_parquet(
    where: Path, source: ParquetFile, groups: range, wanted: list[str], rows: int
) -> Iterator[RecordBatch]:
    import pyarrow as pa

    try:
        for batch in source.iter_batches(batch_size=rows, row_groups=list(groups), columns=wanted):
            yield batch.select(wanted)  # in the order of the request, not of the file
    except (pa.ArrowException, OSError) as error:
        raise _not_parquet(where, error) from error


def _wanted(
    where: Path, names: list[str], columns: Sequence[Column], keep: Sequence[str] | None
) -> list[str]:
    """The columns to read, in the order of the file."""
    check_names(where, names)
    features = [column.name for column in columns]
    missing = [name for name in features if name not in names]
    if missing:
        raise ArgumentError(
            f"{where} lacks {len(missing)} of the {len(features)} columns of the training: "
            f"{list_names(missing)}; it has {list_names(names)}"
        )
    unknown = [name for name in keep or () if name not in names]
    if unknown:
        raise ArgumentError(
            f"--keep {unknown[0]}: {where} has no such column, but {list_names(names)}"
        )
    needed = {*features, *(names if keep is None else keep)}
    return [name for name in names if name in needed]


def _rows_at_a_time(wanted: Sequence[str], most_rows: int) -> int:
    return max(1, min(most_rows, _CELLS // max(1, len(wanted))))


def _split(blocks: Iterable[RecordBatch], rows: int) -> Iterator[RecordBatch]:
    for block in blocks:
        for start in range(0, block.num_rows, rows):
            yield block.slice(start, rows)


@contextlib.contextmanager
def _open_file(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise ArgumentError(f"can't read {path}: {error.strerror}") from error
    with file:
        if not file.seekable():  # a named pipe: nothing is known of its size
            yield file
            return
        if not file.seek(0, io.SEEK_END):
            raise ArgumentError(f"{path} is empty")
        file.seek(0)
        yield file


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _not_parquet(path: Path, error: Exception) -> ArgumentError:
    return ArgumentError(f"{path} isn't a Parquet file that can be read: {error}")
