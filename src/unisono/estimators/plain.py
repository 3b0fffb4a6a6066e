"""Parameters, labels and histories as what JSON can hold, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from unisono.errors import CheckpointError
from unisono.estimators.moments import Array
from unisono.training.history import History
from unisono.training.sampling import Sampling

_LABELS = "OUbifu"  # kinds of numpy dtypes


def plain_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of an estimator.

    A ``random_state`` that is a generator becomes None; a fitted estimator keeps the seed that was
    drawn from it elsewhere.

    Args:
        params: By name.

    Raises:
        ValueError: If the module has no import path.
    """
    found = {name: _plain(value) for name, value in params.items() if name != "module"}
    if not isinstance(found["random_state"], int | None):
        found["random_state"] = None
    return {"module": _import_path(params["module"]), **found}


def plain_array(labels: Array) -> dict[str, Any]:
    """Labels with their dtype.

    Args:
        labels: Strings, numbers or booleans.

    Raises:
        ValueError: If they are something else.

    Shape:
        - labels: (C)

    Example:
        >>> plain_array(np.array(["no", "yes"]))
        {'dtype': '<U3', 'values': ['no', 'yes']}
    """
    values = [value.item() if isinstance(value, np.generic) else value for value in labels.tolist()]
    if labels.dtype.kind not in _LABELS or not all(
        isinstance(value, str | bool | int | float) for value in values
    ):
        raise ValueError(
            f"to_state: labels are strings, numbers or booleans to be stored; got"
            f" {values[:10]!r} of dtype {labels.dtype}"
        )
    return {"dtype": labels.dtype.str if labels.dtype.kind != "O" else "object", "values": values}


def array_from(stored: Mapping[str, Any]) -> Array:
    """The labels, the reverse of `plain_array`.

    Args:
        stored: What it returned.

    Raises:
        CheckpointError: If it is anything else.
    """
    try:
        dtype = np.dtype(str(stored["dtype"]))
        found = np.array(stored["values"], dtype=dtype)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"from_state: classes can't be read: {error}") from error
    if dtype.kind not in _LABELS or found.ndim != 1:
        raise CheckpointError(f"from_state: classes are one list of labels; got {stored!r}")
    return found


def plain_history(history: History) -> dict[str, Any]:
    """A history, without the numbers of the rows that each member was not given."""
    return {**history.to_dict(), "held_out": []}


def history_from(stored: Mapping[str, Any]) -> History:
    """The history, the reverse of `plain_history`.

    Args:
        stored: What it returned.
    """
    n = len(stored["stopped"])

    def array(name: str) -> Any:
        values = stored[name]
        return None if values is None else np.array(values, dtype=np.float64)

    return History(
        loss=array("loss").reshape(-1, n),
        lr=array("lr").reshape(-1, n),
        seconds=array("seconds"),
        validation_loss=array("validation_loss"),
        combined_loss=array("combined_loss"),
        metrics={},
        combined_metrics={},
        best_epoch=np.array(stored["best_epoch"], dtype=np.int64),
        stopped=tuple(stored["stopped"]),
    )


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, Sampling):
        name, options = type(value).__name__.lower(), dataclasses.asdict(value)  # type: ignore[call-overload]
        return {"name": name, **options} if options else name
    if isinstance(value, Sequence | np.ndarray):
        return [_plain(each) for each in value]
    return repr(value)


def _import_path(module: Any) -> str | None:
    if module is None:
        return None
    package, name = getattr(module, "__module__", None), getattr(module, "__qualname__", None)
    if package is None or name is None or "<" in name:
        raise ValueError(
            f"to_state: module={module!r} has no import path, under which it could be found again;"
            f" make it a function of a file, def make_member(n_features, n_outputs), or pickle the"
            f" estimator"
        )
    return f"{package}:{name}"
