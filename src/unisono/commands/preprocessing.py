"""From columns to features with scikit-learn, and back from disk with skops, never pickle.

The input has one number for each column: the value, NaN where it is missing, or the code of
the category (`unisono.commands.features`). The names of the categories stand in ``run.json``,
so the stored pipeline consists of numbers only.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from unisono.commands.columns import Column
from unisono.extras import require

if TYPE_CHECKING:
    from sklearn.compose import ColumnTransformer

# Every type in the files that `to_skops` writes, with the part of skops that reads it. What skops
# trusts by itself is far more, functions of scikit-learn among it.
_TRUSTED: Final = {
    ("builtins", "dict", "DictNode"),
    ("builtins", "list", "ListNode"),
    ("builtins", "slice", "SliceNode"),
    ("builtins", "str", "JsonNode"),
    ("builtins", "str", "TypeNode"),
    ("builtins", "tuple", "TupleNode"),
    ("numpy", "dtype", "DTypeNode"),
    ("numpy", "float32", "TypeNode"),
    ("numpy", "float64", "NdArrayNode"),
    ("numpy", "int64", "NdArrayNode"),
    ("numpy", "ndarray", "NdArrayNode"),
    ("sklearn.compose._column_transformer", "ColumnTransformer", "ObjectNode"),
    ("sklearn.impute._base", "MissingIndicator", "ObjectNode"),
    ("sklearn.impute._base", "SimpleImputer", "ObjectNode"),
    ("sklearn.pipeline", "Pipeline", "ObjectNode"),
    ("sklearn.preprocessing._data", "StandardScaler", "ObjectNode"),
    ("sklearn.preprocessing._encoders", "OneHotEncoder", "ObjectNode"),
}


def fit_preprocessing(table: NDArray[np.float64], columns: Sequence[Column]) -> ColumnTransformer:
    """Fit the preprocessing on the training rows.

    Numbers: the median where a value is missing, and a feature that says so for each column in
    which values are missing; then ``(x - mean) / standard deviation``. Categories: one feature
    for each code, 1 where it is the row's and 0 elsewhere; a code that training never saw gives
    zeros only.

    Args:
        table: The training rows as `encode` gives them.
        columns: What they are.

    Returns:
        A fitted transformer; `to_features` applies it.

    Shape:
        - table: ``(B, columns)``
    """
    require("sklearn", extra="tables", purpose="training on a table")
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = [k for k, column in enumerate(columns) if column.kind == "number"]
    codes = [k for k, column in enumerate(columns) if column.kind == "category"]
    impute = SimpleImputer(strategy="median", add_indicator=True)
    one_hot = OneHotEncoder(
        categories=[np.arange(float(columns[k].num_codes)) for k in codes],
        handle_unknown="ignore",
        sparse_output=False,
        dtype=np.float32,
    )
    parts = [
        ("numbers", Pipeline([("impute", impute), ("scale", StandardScaler())]), numbers),
        ("categories", one_hot, codes),
    ]
    return ColumnTransformer([part for part in parts if part[2]]).fit(table)


def to_features(fitted: ColumnTransformer, table: NDArray[np.float64]) -> NDArray[np.float32]:
    """Apply the fitted preprocessing.

    Shape:
        - table: ``(B, columns)``
        - output: ``(B, features)``
    """
    features: NDArray[np.float32] = fitted.transform(table).astype(np.float32, copy=False)
    return features


def to_skops(fitted: ColumnTransformer) -> bytes:
    """Return the content of a skops file that holds the fitted preprocessing."""
    skops = require("skops.io", extra="tables", purpose="storing the preprocessing")
    content: bytes = skops.dumps(fitted)
    return content


def from_skops(content: bytes, *, num_columns: int) -> ColumnTransformer:
    """Read what `to_skops` wrote, and nothing else: every type in the file is checked before.

    Args:
        content: Of the file.
        num_columns: How many columns the preprocessing must take.

    Raises:
        ValueError: If the content is something else; nothing of it was executed.
    """
    skops = require("skops.io", extra="tables", purpose="reading the preprocessing")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            schema = json.loads(archive.read("schema.json"))
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"not a skops file: {error}") from error
    foreign = sorted({".".join(kind) for kind in _kinds(schema) if kind not in _TRUSTED})
    if foreign:
        raise ValueError(f"it holds types that unisono never writes: {', '.join(foreign[:5])}")
    from sklearn.compose import ColumnTransformer

    try:
        fitted = skops.loads(content, trusted=["numpy.dtype"])
    except Exception as error:  # skops raises what the types' own __setstate__ do
        raise ValueError(f"skops can't read it: {type(error).__name__}: {error}") from error
    found = getattr(fitted, "n_features_in_", None)
    if not isinstance(fitted, ColumnTransformer) or found != num_columns:
        raise ValueError(
            f"a ColumnTransformer of {num_columns} columns is expected, "
            f"found {type(fitted).__name__} of {found}"
        )
    return fitted


def _kinds(node: Any) -> Iterator[tuple[str, str, str]]:
    """Every type that a part of the schema names."""
    if isinstance(node, dict):
        if "__class__" in node or "__module__" in node or "__loader__" in node:
            module, name, loader = (node.get(f"__{key}__") for key in ("module", "class", "loader"))
            yield str(module), str(name), str(loader)
        for value in node.values():
            yield from _kinds(value)
    elif isinstance(node, list):
        for value in node:
            yield from _kinds(value)
