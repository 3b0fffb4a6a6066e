"""The fitted preprocessing as plain arrays: what `unisono predict` applies, without scikit-learn.

Importing scikit-learn and skops takes as long as predicting a million rows. The arrays are taken
from the pipeline that scikit-learn fitted (`unisono.commands.preprocessing`) and give the same
features, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from unisono.commands.columns import Column

if TYPE_CHECKING:
    from sklearn.compose import ColumnTransformer

_TYPES: Final = {"median": "float64", "flagged": "int64", "mean": "float64", "scale": "float64"}


@dataclass(frozen=True, eq=False)
class PlainPreprocessing:
    """From columns to features: see `fit_preprocessing` for what they are.

    Args:
        columns: What the columns are.
        median: Of each column of numbers, for where it is missing.
        flagged: Which of them have a feature that says where they were missing, counted among the
            columns of numbers.
        mean: Of each of these and of the flags after them.
        scale: What to divide by, likewise.

    Shape:
        - median: ``(numbers,)``
        - flagged: ``(flags,)``
        - mean, scale: ``(numbers + flags,)``
    """

    columns: Sequence[Column]
    median: NDArray[np.float64]
    flagged: NDArray[np.int64]
    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Check that the arrays belong to the columns, and to each other.

        Raises:
            ValueError: If they don't.
        """
        numbers, flags = len(self._places("number")), self.flagged.size
        sizes = {"median": numbers, "flagged": flags, "mean": numbers + flags}
        sizes["scale"] = numbers + flags
        expected = {name: f"{_TYPES[name]} ({size},)" for name, size in sizes.items()}
        arrays = {name: getattr(self, name) for name in _TYPES}
        found = {name: f"{own.dtype} {own.shape}" for name, own in arrays.items()}
        if found != expected:
            raise ValueError(
                f"{numbers} columns of numbers and {flags} flags make {expected}, found {found}"
            )
        if not np.isin(self.flagged, np.arange(numbers)).all():
            raise ValueError(f"flagged is {self.flagged.tolist()}, of {numbers} columns of numbers")

    def transform(self, table: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the features: the numbers, their flags, then those of each category.

        Shape:
            - table: ``(B, columns)``
            - output: ``(B, features)``
        """
        places = self._places("category")
        codes = [np.arange(self.columns[k].num_codes) for k in places]
        ends = np.cumsum([len(self.mean), *map(len, codes)])
        features = np.empty((len(table), ends[-1]), np.float32)
        numbers = table[:, self._places("number")]
        missing = np.isnan(numbers)
        filled = np.where(missing, self.median, numbers)
        values = np.concatenate([filled, missing[:, self.flagged]], axis=1)
        values -= self.mean
        values /= self.scale
        with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite
            features[:, : ends[0]] = values
        for k, own, start, end in zip(places, codes, ends[:-1], ends[1:], strict=True):
            features[:, start:end] = table[:, k, None] == own
        return features

    def _places(self, kind: str) -> list[int]:
        return [k for k, column in enumerate(self.columns) if column.kind == kind]


def to_plain(fitted: ColumnTransformer, columns: Sequence[Column]) -> PlainPreprocessing:
    """Take the arrays out of what `fit_preprocessing` returned.

    Args:
        fitted: The pipeline.
        columns: What it was fitted on.
    """
    if "numbers" not in fitted.named_transformers_:
        nothing = np.empty(0)
        return PlainPreprocessing(columns, nothing, nothing.astype(np.int64), nothing, nothing)
    impute, scale = (step for _, step in fitted.named_transformers_["numbers"].steps)
    return PlainPreprocessing(
        columns,
        median=impute.statistics_,
        flagged=impute.indicator_.features_.astype(np.int64),
        mean=scale.mean_,
        scale=scale.scale_,
    )


def pack_plain(found: PlainPreprocessing) -> bytes:
    """Return the content of a safetensors file with the arrays; the columns aren't in it."""
    arrays = {name: np.ascontiguousarray(getattr(found, name)) for name in _TYPES}
    return safetensors.numpy.save(arrays)


def unpack_plain(content: bytes, columns: Sequence[Column]) -> PlainPreprocessing:
    """Put together what `pack_plain` stored.

    Args:
        content: Of the file.
        columns: Those of the training.

    Raises:
        ValueError: If it isn't safetensors, or not the arrays of a preprocessing of these columns.
    """
    try:
        arrays = safetensors.numpy.load(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not safetensors: {error}") from error
    if set(arrays) != set(_TYPES):
        raise ValueError(f"arrays {', '.join(_TYPES)} are expected, found {', '.join(arrays)}")
    return PlainPreprocessing(columns, **arrays)
