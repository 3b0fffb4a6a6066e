"""Writing predictions row by row: CSV or Parquet, the file whole at the end or not there."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from unisono.commands.columns import list_names, value_type
from unisono.commands.outcome import ArgumentError, CommandError
from unisono.commands.table_files import STANDARD
from unisono.files import replacing

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema


class Writer(Protocol):
    """Takes the rows of a file one batch after another."""

    def write(self, batch: RecordBatch) -> None:
        """Append the rows."""


def check_output(path: str, source: str) -> None:
    """Find what keeps a file from being written, before anything is read.

    Args:
        path: What is to be written; ``-`` for standard output.
        source: What is read at the same time, which it mustn't replace.

    Raises:
        ArgumentError: If it is the input, a folder, or in a folder that isn't there.
    """
    if path == STANDARD:
        return
    target = Path(path)
    if target.is_dir():
        raise ArgumentError(f"--output {path} is a folder; give a file")
    if not target.parent.is_dir():
        raise ArgumentError(f"--output {path}: there is no folder {target.parent}")
    if source != STANDARD and target.exists() and Path(source).exists():
        if target.samefile(source):
            raise ArgumentError(f"--output {path} is the input; give another file")


def result_schema(kept: Schema, results: Schema, *, option: str = "--keep") -> Schema:
    """Put kept columns and results side by side.

    Raises:
        ArgumentError: If a column is in both.
    """
    import pyarrow as pa

    both = [name for name in kept.names if name in results.names]
    if both:
        raise ArgumentError(
            f"{option}: the input has columns with names of results: {list_names(both)}; "
            f"rename them, or name the columns to keep without them"
        )
    fields = [pa.field(field.name, value_type(field.type)) for field in kept]
    return pa.schema([*fields, *results], metadata=results.metadata)


@contextlib.contextmanager
def open_results(path: str, schema: Schema) -> Iterator[Writer]:
    """Open a file for results; it takes its place when the block ends well.

    Args:
        path: A file that ends in .csv or .parquet; ``-`` for CSV on standard output.
        schema: Of the rows.

    Raises:
        CommandError: If the disk refuses; then a file that was there before is as it was.
        ArgumentError: If a column can't be written as CSV.
    """
    from pyarrow import csv as pa_csv

    try:
        if path == STANDARD:
            _check_csv(schema)
            with pa_csv.CSVWriter(sys.stdout.buffer, schema) as writer:
                yield writer
            sys.stdout.buffer.flush()
            return
        with replacing(path) as new, _writer(path, new, schema) as writer:
            yield writer
    except OSError as error:
        where = "standard output" if path == STANDARD else path
        raise CommandError(f"can't write to {where}: {error.strerror or error}") from error


def _writer(path: str, new: Path, schema: Schema) -> Any:
    if Path(path).suffix.lower() == ".csv":
        from pyarrow import csv as pa_csv

        _check_csv(schema)
        return pa_csv.CSVWriter(str(new), schema)
    import pyarrow.parquet as pq

    # A dictionary of values that all differ, as probabilities do, costs time and saves nothing.
    return pq.ParquetWriter(str(new), schema, use_dictionary=_repeated(schema))


def _repeated(schema: Schema) -> Sequence[str]:
    import pyarrow.types as is_type

    return [field.name for field in schema if not is_type.is_floating(field.type)]


def _check_csv(schema: Schema) -> None:
    import pyarrow.types as is_type

    nested = [f"{field.name} ({field.type})" for field in schema if is_type.is_nested(field.type)]
    if nested:
        raise ArgumentError(f"CSV can't hold {list_names(nested)}; write a .parquet file")
