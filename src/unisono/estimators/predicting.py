"""Outputs of all members for many rows, chunk after chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from unisono.ensemble import Ensemble
from unisono.estimators.moments import Array
from unisono.uncertainty import Uncertainty, regression

_BYTES: Final = 2**21  # of the widest activation of all members: it stays in a core's cache


def predict_rows(
    ens: Ensemble, x: Array, what: Callable[[Any], Sequence[Tensor]]
) -> tuple[Array, ...]:
    """Take ``what(ens(x))`` for all rows.

    Args:
        ens: The ensemble, in eval mode.
        x: The rows.
        what: Outputs of all members for some rows -> results, with the rows on axis 0.

    Returns:
        The results for all rows.

    Shape:
        - x: (B, F)
        - what: (N, b, *) -> (b, *) each
        - returns: (B, *) each
    """
    parameter = next(ens.parameters())
    dtype = np.float32 if parameter.dtype == torch.float32 else np.float64
    size = rows_at_once(ens, x.shape[1])
    found: list[Array] = []
    with torch.inference_mode():
        for start in range(0, len(x), size):
            chunk = in_precision(x[start : start + size], dtype)
            rows = torch.from_numpy(np.require(chunk, requirements=["C", "W"]))
            outputs = ens(rows.to(parameter.device))
            results = [result.cpu().numpy() for result in what(outputs)]
            if not found:
                found = [np.empty((len(x), *own.shape[1:]), own.dtype) for own in results]
            for whole, own in zip(found, results, strict=True):
                whole[start : start + size] = own
    return tuple(found)


def value_uncertainty(ens: Ensemble, x: Array, mean: Array, scale: Array) -> Uncertainty:
    """Take the moments of the mixture of all members, ``outputs * scale + mean``, for all rows.

    Args:
        ens: Members that predict standardised targets, as points or as mean and variance.
        x: The rows.
        mean: Of the targets.
        scale: What they were divided by.

    Returns:
        Arrays: the mean, and the variances in the squared unit of the targets.

    Shape:
        - x: (B, F)
        - mean, scale: (T)
        - returns: (B, T) each
    """

    def parts(outputs: Any) -> list[Tensor]:
        variance = None if isinstance(outputs, Tensor) else outputs[1]
        return list(regression(mean_of(outputs), variance))

    prediction, *variances = predict_rows(ens, x, parts)
    return Uncertainty(prediction * scale + mean, *(own * np.square(scale) for own in variances))


def mean_of(outputs: Any) -> Tensor:
    """The means in what members return: a tensor, or a pair of mean and variance."""
    mean: Tensor = outputs if isinstance(outputs, Tensor) else outputs[0]
    return mean


def in_precision(values: Array, dtype: type[np.floating[Any]]) -> Array:
    """Finite numbers in the precision of the network.

    Args:
        values: Numbers of any floating dtype.
        dtype: That of the network.

    Raises:
        ValueError: If one is too large for it.

    Example:
        >>> in_precision(np.array([1e300]), np.float32)
        Traceback (most recent call last):
        ValueError: the data hold 1e+300, which is too large for float32; pass dtype="float64"
    """
    if values.dtype == dtype:
        return values
    with np.errstate(over="ignore"):  # what overflows is an error below
        found: Array = values.astype(dtype)
    if not np.isfinite(found).all():
        largest = np.abs(values).max()
        raise ValueError(
            f"the data hold {largest:.6g}, which is too large for {np.dtype(dtype)}; pass"
            f' dtype="float64"'
        )
    return found


def rows_at_once(ens: Ensemble, n_features: int) -> int:
    """How many rows a call of the ensemble takes.

    Args:
        ens: The ensemble.
        n_features: Columns of a row.
    """
    own = [p.shape if name in ens.shared else p.shape[1:] for name, p in _parameters(ens)]
    widest = max([n_features, *(shape[0] for shape in own if len(shape))])
    size = next(ens.parameters()).element_size()
    return max(64, _BYTES // (size * len(ens) * widest))


def _parameters(ens: Ensemble) -> list[tuple[str, Tensor]]:
    return list(ens.members.named_parameters())
