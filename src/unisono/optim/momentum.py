"""What SGD and RMSprop share: a momentum buffer that members may have or not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from unisono.optim.hyperparameters import Array, Values


def gradient_coefficients(values: Values) -> dict[str, Array]:
    """``sign`` and ``decay`` of the gradient, where a member needs them."""
    found = {}
    if values.columns["maximize"].any():
        found["sign"] = 1 - 2 * values.columns["maximize"]
    if values.columns["weight_decay"].any():
        found["decay"] = values.columns["weight_decay"]
    return found


def momentum_coefficients(
    values: Values, keep: Array, take: Array, nesterov: Array
) -> dict[str, Array]:
    """``b = keep * b + take * u`` and ``p += direct * u + buffered * b``.

    A member without momentum keeps its buffer as it is and takes the update u itself.

    Args:
        values: The hyperparameters.
        keep: The factor of the buffer, of members with momentum.
        take: The factor of the update, likewise.
        nesterov: Which members look ahead.
    """
    rate, momentum = -values.columns["lr"], values.columns["momentum"]
    has = momentum > 0
    if not has.any():
        return {"direct": rate}
    found = {
        "keep": np.where(has, keep, 1),
        "take": np.where(has, take, 0),
        "buffered": rate * np.where(nesterov > 0, momentum, has),
    }
    is_direct = (nesterov > 0) | ~has
    if is_direct.any():
        found["direct"] = rate * is_direct
    return found


def apply(
    parameter: Tensor,
    update: Tensor,
    state: Mapping[str, Tensor],
    coefficients: Mapping[str, Tensor],
) -> None:
    """Go along the update: directly, by way of the buffer, or both."""
    if "keep" in coefficients:
        buffer = state["momentum_buffer"]
        buffer.mul_(coefficients["keep"]).addcmul_(update, coefficients["take"])
        parameter.addcmul_(buffer, coefficients["buffered"])
    if "direct" in coefficients:
        parameter.addcmul_(update, coefficients["direct"])
