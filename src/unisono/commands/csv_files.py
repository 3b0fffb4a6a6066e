"""Reading CSV with pyarrow: the header checked before the rows, errors with column and row."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from unisono.commands.columns import Column, list_names
from unisono.commands.outcome import ArgumentError

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Table
    from pyarrow.csv import CSVStreamingReader

# What pyarrow takes for a missing number in CSV; here it is a missing text too.
MISSING: Final = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("N/A", "NA", "NULL", "NaN", "n/a", "nan", "null"),
)
_BLOCK: Final = 4 << 20  # bytes read at a time
_MOST_HEADER: Final = 1 << 24  # bytes
_CONVERSION: Final = re.compile(
    r"In CSV column #(\d+): (?:Row #(\d+): )?CSV conversion error to (\w+).*?: (.*)", re.DOTALL
)
_WORDS: Final = {"double": "a number", "int64": "a whole number", "bool": "true or false"}


def read_header(where: Path, file: BinaryIO) -> list[str]:
    """Read the names of the columns; the file stands at the first row afterwards.

    Args:
        where: Name of the file, for messages.
        file: At its start.

    Raises:
        ArgumentError: If the file is empty, isn't UTF-8, has no rows, or two columns of one name.
    """
    line = file.readline(_MOST_HEADER)
    while line.count(b'"') % 2 and (more := file.readline(_MOST_HEADER)):
        line += more  # a name with a line break in it
    if not line.strip():
        raise ArgumentError(f"{where} is empty" if not line else f"{where} has no header")
    try:
        names = next(csv.reader(io.StringIO(line.decode("utf-8-sig"), newline="")))
    except UnicodeDecodeError:
        raise _not_utf8(where) from None
    except csv.Error as error:
        raise ArgumentError(f"{where}: the header isn't CSV: {error}") from error
    if len(names) == 1 and (found := [mark for mark in ";\t|" if mark in names[0]]):
        raise ArgumentError(
            f"{where} has one column, {names[0]!r}; its values seem to be separated by "
            f"{found[0]!r}, and must be by commas"
        )
    return names


def read_all(where: Path, file: BinaryIO) -> Table:
    """Read a whole file, the types found from all its values.

    Raises:
        ArgumentError: If it is damaged; `explain` says how.
    """
    import pyarrow as pa
    from pyarrow import csv as pa_csv

    names = read_header(where, file)
    try:
        table = pa_csv.read_csv(
            file,
            pa_csv.ReadOptions(column_names=names, block_size=_BLOCK),
            _parsing(names),
            pa_csv.ConvertOptions(null_values=MISSING, strings_can_be_null=True),
        )
    except pa.ArrowInvalid as error:
        raise explain(where, error, names, wanted=names) from error
    if pa.binary() in table.schema.types:
        raise _not_utf8(where)
    return table


def open_csv(
    where: Path,
    file: BinaryIO,
    names: Sequence[str],
    *,
    columns: Sequence[Column],
    wanted: Sequence[str],
) -> CSVStreamingReader:
    """Open a file whose header has been read.

    Args:
        where: Name of the file, for messages.
        file: At its first row.
        names: All columns of the file.
        columns: The features, read as the types they had in training.
        wanted: The columns to read; what isn't a feature stays text.

    Raises:
        ArgumentError: If the first block can't be read.
    """
    import pyarrow as pa

    try:
        return _open(file, names, columns, wanted, threads=True)
    except pa.ArrowInvalid as error:
        raise explain(where, error, names, columns, wanted) from error


def read_batches(
    where: Path,
    reader: CSVStreamingReader,
    names: Sequence[str],
    *,
    columns: Sequence[Column],
    wanted: Sequence[str],
) -> Iterator[RecordBatch]:
    """Give the rows in order, with the texts that mean a missing value as nulls.

    Raises:
        ArgumentError: If a value isn't of its column's type, or a row has too many values.
    """
    import pyarrow as pa

    texts = {column.name for column in columns if column.type == "string"}
    while True:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except pa.ArrowInvalid as error:
            raise explain(where, error, names, columns, wanted) from error
        yield _missing_as_null(batch, texts)


def explain(
    where: Path,
    error: Exception,
    names: Sequence[str],
    columns: Sequence[Column] = (),
    wanted: Sequence[str] = (),
) -> ArgumentError:
    """Say which value of which column and row is the trouble.

    pyarrow knows the row only if it reads on one thread, so a file is read once more.
    """
    import pyarrow as pa

    if where.is_file() and wanted:
        try:
            with where.open("rb") as file:
                read_header(where, file)
                for _ in _open(file, names, columns, wanted, threads=False):
                    pass
        except pa.ArrowInvalid as found:
            error = found
    if "invalid UTF8" in str(error):
        return _not_utf8(where)
    if str(error) == "Empty CSV file":
        return ArgumentError(f"{where} has a header and no rows")
    match = _CONVERSION.match(str(error))
    if match is None:
        return ArgumentError(f"{where}: {error}")
    number, row, kind, rest = match.groups()
    at = f"row {int(row):,}, " if row else ""
    value = rest.removeprefix("invalid value ")
    return ArgumentError(
        f"{where}: {at}column {names[int(number)]!r}: {_WORDS.get(kind, kind)} is expected, as in "
        f"the training, got {value}"
    )


def _open(
    file: BinaryIO,
    names: Sequence[str],
    columns: Sequence[Column],
    wanted: Sequence[str],
    *,
    threads: bool,
) -> CSVStreamingReader:
    import pyarrow as pa
    from pyarrow import csv as pa_csv

    types: dict[str, Any] = {name: pa.string() for name in wanted}
    types |= {column.name: pa.type_for_alias(column.type) for column in columns}
    return pa_csv.open_csv(
        file,
        pa_csv.ReadOptions(column_names=list(names), block_size=_BLOCK, use_threads=threads),
        _parsing(names),
        pa_csv.ConvertOptions(
            column_types=types, include_columns=list(wanted), null_values=MISSING
        ),
    )


def _parsing(names: Sequence[str]) -> Any:
    from pyarrow import csv as pa_csv

    # An empty line among rows of one value is a missing value.
    return pa_csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=len(names) > 1)


def _missing_as_null(batch: RecordBatch, texts: Collection[str]) -> RecordBatch:
    import pyarrow as pa
    import pyarrow.compute as pc

    missing = pa.array(MISSING)
    arrays = [
        pc.if_else(pc.is_in(array, value_set=missing), None, array) if name in texts else array
        for name, array in zip(batch.schema.names, batch.columns, strict=True)
    ]
    return pa.record_batch(arrays, schema=batch.schema)


def _not_utf8(where: Path) -> ArgumentError:
    return ArgumentError(
        f"{where} isn't UTF-8; convert it first, as: "
        f"iconv -f latin1 -t utf-8 {where.name} > utf8.csv"
    )


def check_names(where: Path, names: Sequence[str]) -> None:
    """Raise if two columns have one name.

    Raises:
        ArgumentError: With the names.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(f"{where} has two columns of one name: {list_names(twice)}")
