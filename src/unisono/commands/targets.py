"""The column to predict: its values as numbers, and the rows that are kept for testing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from unisono.commands.columns import is_number, is_text, list_names, value_type
from unisono.commands.outcome import ArgumentError

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Table

Label: TypeAlias = str | int | float | bool

MOST_CLASSES: Final = 1000


@dataclass(frozen=True, eq=False)
class Target:
    """The values to predict.

    Args:
        values: Index of the class (int64), or the number (float64).
        classes: The labels, sorted; empty for regression.

    Shape:
        - values: ``(B,)``
    """

    values: NDArray[Any]
    classes: tuple[Label, ...] = ()


def read_target(table: Table, name: str, task: str) -> Target:
    """Take the target out of a table.

    Args:
        table: All rows.
        name: Of the column.
        task: ``"classification"`` or ``"regression"``.

    Raises:
        ArgumentError: If there is no such column, a value is missing, or the values don't suit
            the task.

    Example:
        >>> import pyarrow as pa
        >>> found = read_target(pa.table({"kind": ["b", "a", "b", "a"]}), "kind", "classification")
        >>> found.values.tolist(), found.classes
        ([1, 0, 1, 0], ('a', 'b'))
    """
    import pyarrow.compute as pc

    if name not in table.column_names:
        raise ArgumentError(
            f"--target {name}: there is no such column; there are {list_names(table.column_names)}"
        )
    column = table[name].combine_chunks()
    missing = pc.is_null(column, nan_is_null=True).to_numpy(zero_copy_only=False)
    if missing.any():
        raise ArgumentError(
            f"--target {name}: the value is missing in {int(missing.sum()):,} of {len(column):,} "
            f"rows (first: row {int(missing.argmax()) + 1:,}); take these rows out of the file"
        )
    return (_labels if task == "classification" else _numbers)(column, name)


def _labels(column: ChunkedArray, name: str) -> Target:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as is_type

    kind = value_type(column.type)
    values = column.cast(kind)
    if is_type.is_decimal(kind):
        values = values.cast(pa.float64())
    elif not (is_text(kind) or is_number(kind) or is_type.is_boolean(kind)):
        raise ArgumentError(f"--target {name}: {kind} can't be classes; give texts or numbers")
    found = pc.unique(values).to_pylist()
    if len(found) < 2:
        raise ArgumentError(f"--target {name}: every row is of class {found[0]!r}; two are needed")
    if len(found) > MOST_CLASSES or (is_type.is_floating(kind) and len(found) > len(values) // 2):
        raise ArgumentError(
            f"--target {name}: {len(found):,} different values in {len(values):,} rows are no "
            f"classes; numbers are learnt with --task regression"
        )
    classes = sorted(found)
    counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(values).to_pylist()}
    alone = [repr(label) for label in classes if counts[label] < 2]
    if alone:
        raise ArgumentError(
            f"--target {name}: only 1 row is of class {list_names(alone)}; a class needs one to "
            f"train on and one to test on"
        )
    codes = pc.index_in(values, value_set=pa.array(classes, values.type))
    return Target(codes.to_numpy(zero_copy_only=False).astype(np.int64), tuple(classes))


def _numbers(column: ChunkedArray, name: str) -> Target:
    kind = value_type(column.type)
    if not is_number(kind):
        raise ArgumentError(
            f"--target {name}: {kind} is no number; classes are learnt with --task classification"
        )
    values = column.cast("double").to_numpy(zero_copy_only=False)
    infinite = np.isinf(values)
    if infinite.any():
        row = int(infinite.argmax()) + 1
        raise ArgumentError(f"--target {name}: the value in row {row:,} is infinite")
    if values.min() == values.max():
        raise ArgumentError(f"--target {name}: every row has the value {values[0]:g}")
    return Target(values)


def split_rows(
    target: Target, share: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the rows into those to train on and those to test on, each in ascending order.

    For classification, every class has its share in both, as far as its rows can be divided.

    Args:
        target: The values to predict.
        share: Part of the rows to test on, between 0 and 1.
        seed: Another seed, another split.

    Raises:
        ArgumentError: If a class would be missing among the rows to train on, or one of the two
            parts empty.

    Example:
        >>> train, test = split_rows(Target(np.arange(10) % 2, (0, 1)), 0.2, seed=0)
        >>> len(train), len(test), (test % 2).tolist() in ([0, 1], [1, 0])
        (8, 2, True)
    """
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(target.values))
    labels = target.values if target.classes else None
    try:
        train, test = train_test_split(
            rows, test_size=share, random_state=seed % 2**32, stratify=labels
        )
    except ValueError as error:  # too few rows for it
        raise ArgumentError(f"--test-share {share:g} of {len(rows):,} rows: {error}") from error
    lost = sorted(set(range(len(target.classes))) - set(target.values[train].tolist()))
    if lost:
        names = list_names([repr(target.classes[k]) for k in lost])
        raise ArgumentError(f"--test-share {share:g}: no row of class {names} is left to train on")
    return np.sort(train), np.sort(test)
