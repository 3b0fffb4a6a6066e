"""From rows of a table to one number per column, and what in them training never saw (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from unisono.commands.columns import Column, is_number, is_text, value_type

if TYPE_CHECKING:
    from pyarrow import Array, DataType, RecordBatch, Schema

_MOST_VALUES: Final = 5


@dataclass(frozen=True)
class Finding:
    """Values in one column that the training has nothing to say about.

    Args:
        column: Name of the column.
        what: ``"unseen"``: categories; ``"missing"``: values, where none were missing in the
            training rows; ``"infinite"``: numbers; ``"too large"``: numbers that are finite, but
            not in float32 once they are standardised.
        count: In how many rows.
        first_row: The first of them; the first row of the file is 1.
        values: The first different ones, for categories.
    """

    column: str
    what: Literal["unseen", "missing", "infinite", "too large"]
    count: int
    first_row: int
    values: tuple[str, ...] = ()

    @property
    def is_hopeless(self) -> bool:
        """Whether nothing can be predicted from it, whatever the user allows."""
        return self.what in ("infinite", "too large")

    def __str__(self) -> str:
        rows = "1 row" if self.count == 1 else f"{self.count:,} rows"
        where = f"row {self.first_row:,}" if self.count == 1 else f"first: row {self.first_row:,}"
        if self.what == "unseen":
            listed = ", ".join(repr(value) for value in self.values)
            more = " ..." if len(self.values) == _MOST_VALUES else ""
            return f"column {self.column!r}: {listed}{more} in {rows} ({where})"
        return f"column {self.column!r}: {self.what} in {rows} ({where})"


class TooLargeError(ValueError):
    """Rows hold numbers whose features aren't finite.

    Args:
        places: Which rows.

    Shape:
        - places: ``(B,)``
    """

    def __init__(self, places: NDArray[np.bool_]) -> None:
        super().__init__(f"{int(places.sum())} rows hold numbers that are too large")
        self.places = places


def too_large(
    values: NDArray[np.float64],
    columns: Sequence[Column],
    places: NDArray[np.bool_],
    *,
    rows_before: int = 0,
) -> list[Finding]:
    """Name the column with the largest number in each of the rows that hold some too large.

    Args:
        values: What `encode` gave.
        columns: The features.
        places: Which rows.
        rows_before: As for `encode`.

    Shape:
        - values: ``(B, columns)``
        - places: ``(B,)``

    Example:
        >>> columns = [Column(name, "number", "double", False, ()) for name in "ab"]
        >>> values = np.array([[1.0, 2.0], [3.0, -1e300]])
        >>> [str(found) for found in too_large(values, columns, np.array([False, True]))]
        ["column 'b': too large in 1 row (row 2)"]
    """
    worst = np.nanargmax(np.abs(values[places]), axis=1)
    rows = rows_before + 1 + np.flatnonzero(places)
    return [
        Finding(columns[k].name, "too large", int((worst == k).sum()), int(rows[worst == k][0]))
        for k in np.unique(worst)
    ]


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """Put the findings of one column and kind together.

    Example:
        >>> [found] = merge([Finding("x", "missing", 2, 5), Finding("x", "missing", 1, 70)])
        >>> str(found)
        "column 'x': missing in 3 rows (first: row 5)"
    """
    merged: dict[tuple[str, str], Finding] = {}
    for new in findings:
        old = merged.get((new.column, new.what))
        if old is not None:
            values = tuple(dict.fromkeys(old.values + new.values))[:_MOST_VALUES]
            first = min(old.first_row, new.first_row)
            new = Finding(new.column, new.what, old.count + new.count, first, values)
        merged[new.column, new.what] = new
    return list(merged.values())


def encode(
    batch: RecordBatch, columns: Sequence[Column], *, rows_before: int = 0
) -> tuple[NDArray[np.float64], list[Finding]]:
    """Return one number for every row and column, and what training never saw.

    A number is itself, NaN where it is missing. A category is its index among
    ``column.categories``; one more where it is missing and was so in training; -1 if unseen.

    Args:
        batch: Rows with at least these columns, of types that `wrong_types` has nothing against.
        columns: The features.
        rows_before: Rows of the file that came before, for the row numbers of the findings.

    Shape:
        - output: ``(B, columns)``

    Example:
        >>> import pyarrow as pa
        >>> batch = pa.record_batch({"colour": ["red", "green", "blue"]})
        >>> colour = Column("colour", "category", "string", False, ("blue", "red"))
        >>> values, findings = encode(batch, [colour])
        >>> values.ravel().tolist(), str(findings[0])
        ([1.0, -1.0, 0.0], "column 'colour': 'green' in 1 row (row 2)")
    """
    values = np.empty((batch.num_rows, len(columns)))
    findings: list[Finding] = []
    for k, column in enumerate(columns):
        array = batch.column(column.name)
        fill = _numbers if column.kind == "number" else _codes
        findings += fill(array, column, values[:, k], rows_before)
    return values, findings


def _numbers(array: Array, column: Column, into: NDArray[np.float64], before: int) -> list[Finding]:
    into[:] = array.cast("double").to_numpy(zero_copy_only=False)
    if np.isfinite(into).all():
        return []
    rows = {"infinite": np.isinf(into)}
    if not column.missing:
        rows["missing"] = np.isnan(into)
    return [
        Finding(column.name, what, int(places.sum()), before + int(places.argmax()) + 1)  # type: ignore[arg-type]  # a key of `rows`
        for what, places in rows.items()
        if places.any()
    ]


def _codes(array: Array, column: Column, into: NDArray[np.float64], before: int) -> list[Finding]:
    import pyarrow as pa
    import pyarrow.compute as pc

    texts = array.cast(value_type(array.type)).cast(column.type).cast("string")
    known = pa.array(column.categories, pa.string())
    codes = pc.index_in(texts, value_set=known, skip_nulls=True)
    into[:] = pc.fill_null(codes, -1).to_numpy(zero_copy_only=False)
    if codes.null_count == 0:
        return []
    empty = texts.is_null().to_numpy(zero_copy_only=False)
    unseen = (into < 0) & ~empty
    findings = []
    if unseen.any():
        values = pc.unique(texts.filter(pa.array(unseen))).to_pylist()[:_MOST_VALUES]
        first = before + int(unseen.argmax()) + 1
        findings.append(Finding(column.name, "unseen", int(unseen.sum()), first, tuple(values)))
    if column.missing:
        into[empty] = len(column.categories)
    elif empty.any():
        first = before + int(empty.argmax()) + 1
        findings.append(Finding(column.name, "missing", int(empty.sum()), first))
    return findings


def wrong_types(schema: Schema, columns: Sequence[Column]) -> list[str]:
    """Say which columns of a file hold something else than in the training.

    Args:
        schema: Of the file; it has every column.
        columns: The features.

    Example:
        >>> import pyarrow as pa
        >>> age = Column("age", "number", "double", False)
        >>> wrong_types(pa.schema({"age": pa.string()}), [age])
        ["column 'age' holds texts; training had numbers"]
    """
    had = {"double": "numbers", "int64": "whole numbers", "bool": "booleans", "string": "texts"}
    return [
        f"column {column.name!r} holds {_what(kind)}; training had {had[column.type]}"
        for column in columns
        if not _fits(column, kind := schema.field(column.name).type)
    ]


def _what(kind: DataType) -> str:
    """Values of a type, in the words of the messages."""
    import pyarrow.types as is_type

    kind = value_type(kind)
    if is_text(kind):
        return "texts"
    if is_number(kind):
        return "numbers"
    return "booleans" if is_type.is_boolean(kind) else str(kind)


def _fits(column: Column, kind: DataType) -> bool:
    import pyarrow.types as is_type

    kind = value_type(kind)
    if is_type.is_null(kind):
        return True
    if column.type == "string":
        return is_text(kind)
    if column.type == "bool":
        return bool(is_type.is_boolean(kind))
    return is_number(kind)
