"""Class labels of any kind as numbers, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.estimators.moments import Array


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of each label column.

    Args:
        classes: The sorted labels of each column.
        is_single: Whether labels come as one column without an axis of columns.
    """

    classes: tuple[Array, ...]
    is_single: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of classes of each column."""
        return tuple(len(own) for own in self.classes)

    def encode(self, call: str, y: Array) -> Array:
        """The place of each label among the classes.

        Args:
            call: Name of the public function, for the message.
            y: Labels.

        Returns:
            Numbers from 0, int64.

        Shape:
            - y, returns: (B) if `is_single`, else (B, columns)

        Raises:
            ValueError: If there is a label that is no class, or another number of columns.
        """
        columns = y[:, None] if self.is_single else y
        if columns.ndim != 2 or columns.shape[1] != len(self.classes):
            raise ValueError(
                f"{call}: y has {len(self.classes)} label columns in the first call; got shape"
                f" {y.shape}"
            )
        codes = np.empty(columns.shape, dtype=np.int64)
        for k, own in enumerate(self.classes):
            column = columns[:, k]
            unknown = np.setdiff1d(column, own)
            if len(unknown):
                where = "" if self.is_single else f"[:, {k}]"
                raise ValueError(
                    f"{call}: y{where} holds labels that are no classes: {unknown[:10].tolist()};"
                    f" the classes are {own[:10].tolist()}; name all of them in the first call:"
                    f" partial_fit(X, y, classes=...)"
                )
            codes[:, k] = np.searchsorted(own, column)
        return codes[:, 0] if self.is_single else codes

    def decode(self, codes: Sequence[Array]) -> Array:
        """The labels at these places, the reverse of `encode`.

        Args:
            codes: Places for each column.

        Shape:
            - codes: (B) each
            - returns: (B) if `is_single`, else (B, columns)
        """
        columns = [own[code] for own, code in zip(self.classes, codes, strict=True)]
        return columns[0] if self.is_single else np.stack(columns, 1)

    def split(self, outputs: Tensor) -> tuple[Tensor, ...]:
        """Logits of each column.

        Shape:
            - outputs: (*, sum of sizes)
        """
        return torch.split(outputs, list(self.sizes), -1)


def labels_of(y: Array) -> Labels:
    """The labels that stand in each column.

    Args:
        y: Labels.

    Shape:
        - y: (B) or (B, columns)

    Raises:
        ValueError: If a column holds labels of several kinds.

    Example:
        >>> labels_of(np.array(["no", "yes", "no"])).classes
        (array(['no', 'yes'], dtype='<U3'),)
    """
    if y.ndim == 1:
        return Labels((_sorted("y", y),), is_single=True)
    columns = [_sorted(f"y[:, {k}]", column) for k, column in enumerate(y.T)]
    return Labels(tuple(columns), is_single=False)


def _sorted(name: str, column: Array) -> Array:
    """The labels of a column in order."""
    try:
        return np.unique(column)
    except TypeError as error:
        kinds = ", ".join(sorted({type(label).__name__ for label in column}))
        raise ValueError(
            f"{name}: labels of one column can be put in order, so they are of one kind; got"
            f" {kinds}; y.astype(str) makes them strings"
        ) from error


def check_classes(call: str, classes: Any, y: Array) -> Labels:
    """The labels that the user says there are.

    Args:
        call: Name of the public function, for the message.
        classes: An array of labels; a list of them for several columns.
        y: The labels of the first call.

    Raises:
        ValueError: If there are none, or not as many lists as columns.
    """
    if classes is None:
        raise ValueError(
            f"{call}: the first call doesn't see all labels perhaps; name them:"
            f" partial_fit(X, y, classes=np.unique(y_all))"
        )
    if y.ndim == 1:
        return Labels((np.unique(np.asarray(classes)),), is_single=True)
    if len(classes) != y.shape[1]:
        raise ValueError(
            f"{call}: classes is a list with the classes of each of the {y.shape[1]} label columns;"
            f" got {len(classes)}"
        )
    return Labels(tuple(np.unique(np.asarray(own)) for own in classes), is_single=False)
