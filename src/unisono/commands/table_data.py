"""From the file of a table to what a training takes: rows split, columns chosen, features made."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from unisono.commands.columns import Choice, choose_columns
from unisono.commands.features import Finding, encode
from unisono.commands.outcome import ArgumentError
from unisono.commands.preprocessing import fit_preprocessing, to_features
from unisono.commands.table_files import read_table
from unisono.commands.targets import Target, read_target, split_rows

if TYPE_CHECKING:
    from pyarrow import Table
    from sklearn.compose import ColumnTransformer


@dataclass(frozen=True, eq=False)
class TableData:
    """A table, ready for training.

    Args:
        choice: Which columns are features, and why others are none.
        preprocessing: Fitted on the training rows.
        features: Of all rows.
        target: Of all rows.
        train: The rows to train on, counted from 0.
        test: The rows to test on.
        test_table: These rows as they stand in the file, features and target.
        notes: What in the test rows the training rows have nothing of.

    Shape:
        - features: ``(B, features)``
    """

    choice: Choice
    preprocessing: ColumnTransformer
    features: NDArray[np.float32]
    target: Target
    train: NDArray[np.int64]
    test: NDArray[np.int64]
    test_table: Table
    notes: list[str]


def prepare(
    path: Path,
    *,
    target: str,
    task: str,
    test_share: float,
    seed: int,
    categorical: Collection[str] = (),
    drop: Collection[str] = (),
) -> TableData:
    """Read a table, split its rows, and turn its columns into features.

    What a column is, its categories, median, mean and scale come from the training rows only.

    Args:
        path: The file.
        target: The column to predict.
        task: ``"classification"`` or ``"regression"``.
        test_share: Part of the rows to test on.
        seed: Of the split.
        categorical: Columns of whole numbers that are categories.
        drop: Columns to leave out.

    Raises:
        ArgumentError: If the table doesn't suit the request.
    """
    table = read_table(path)
    values = read_target(table, target, task)
    train, test = split_rows(values, test_share, seed)
    choice = choose_columns(table.take(train), target=target, categorical=categorical, drop=drop)
    names = [column.name for column in choice.columns]
    [batch] = table.select(names).combine_chunks().to_batches()
    encoded, findings = encode(batch, choice.columns)
    infinite = [finding for finding in findings if finding.what == "infinite"]
    if infinite:
        raise ArgumentError(f"{path}: {'; '.join(map(str, infinite))}")
    fitted = fit_preprocessing(encoded[train], choice.columns)
    return TableData(
        choice=choice,
        preprocessing=fitted,
        features=to_features(fitted, encoded),
        target=values,
        train=train,
        test=test,
        test_table=table.select([*names, target]).take(test),
        notes=_notes(choice, findings),
    )


def _notes(choice: Choice, findings: list[Finding]) -> list[str]:
    dropped = [f"column {name!r} is left out: {why}" for name, why in choice.dropped.items()]
    # They can only be in the test rows, or else training would have seen them.
    return [*dropped, *(f"only in the test rows: {finding}" for finding in findings)]
