"""What plots take: arrays and tensors, checked and turned into NumPy arrays in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]
Values: TypeAlias = "Array | Tensor | Sequence[Any]"
"""Numbers to draw: a NumPy array, a tensor on any device, or lists of numbers."""

Given: TypeAlias = "Mapping[str, tuple[Values | None, str]]"

_NEVER_EMPTY: Final = frozenset("NBCnm")


def to_array(values: Values) -> Array:
    """Return numbers as a NumPy array: floating ones in float64, others as they are."""
    if isinstance(values, Tensor):
        values = values.detach()
        if values.is_floating_point():  # bfloat16, which NumPy doesn't know, too
            values = values.to(torch.float64)
        return values.numpy(force=True)
    found = np.asarray(values)
    return found.astype(np.float64) if found.dtype.kind == "f" else found


def checked(call: str, given: Given) -> dict[str, Array]:
    """Turn all arguments of a plot into arrays, or say everything that is wrong with them.

    Args:
        call: Name of the plot.
        given: Argument -> its values and its axes, as ``"N B"``; a letter stands for the same
            number wherever it is met. Values that are None are left out.

    Returns:
        Argument -> its array.

    Raises:
        TypeError: If something holds no numbers.
        ValueError: If the shapes don't fit together, or there is nothing to draw.
    """
    arrays = {name: to_array(own) for name, (own, _) in given.items() if own is not None}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise TypeError(f"plots.{call}: {name} must hold real numbers, got dtype {array.dtype}")
    axes = {name: tuple(letters.split()) for name, (_, letters) in given.items()}
    if not _fit({name: array.shape for name, array in arrays.items()}, axes):
        told = [
            f"  {name}: {_shape(axes[name])}, got {array.shape}" for name, array in arrays.items()
        ]
        raise ValueError(
            f"plots.{call}: the shapes don't fit together, or one is empty; expected\n"
            + "\n".join(told)
        )
    return arrays


def check_finite(call: str, arrays: Mapping[str, Array]) -> None:
    """Raise `ValueError` for the first array with a value that can't be drawn."""
    for name, array in arrays.items():
        wrong = ~np.isfinite(array)
        if wrong.any():
            first = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(
                f"plots.{call}: {name} must be finite, but {wrong.sum():,} of {wrong.size:,} "
                f"values are not; the first is {array[first]} at {first}"
            )


def _fit(shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, tuple[str, ...]]) -> bool:
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if len(shape) != len(axes[name]):
            return False
        for letter, size in zip(axes[name], shape, strict=True):
            if sizes.setdefault(letter, size) != size or (letter[0] in _NEVER_EMPTY and size == 0):
                return False
    return True


def _shape(letters: Sequence[str]) -> str:
    return f"({', '.join(letters)}{',' if len(letters) == 1 else ''})"
