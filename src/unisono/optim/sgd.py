"""The update of SGD.

Reference: https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.optim import fused, momentum
from unisono.optim.elementwise import Scratch, descent
from unisono.optim.fused import Tensors
from unisono.optim.hyperparameters import Array, Hyperparameter, Steps, Values, at_least_zero, flag
from unisono.optim.paths import Method


class SGDMethod(Method):
    """``b = momentum * b + (1 - dampening) * g``, ``p -= lr * b``; the first b is g itself."""

    name = "SGD"
    hyperparameters = (
        at_least_zero("lr"),
        at_least_zero("momentum"),
        Hyperparameter("dampening"),
        at_least_zero("weight_decay"),
        flag("nesterov"),
        flag("maximize"),
    )

    def problems(self, values: Mapping[str, Any]) -> list[str]:
        """Nesterov's momentum needs one, and no dampening."""
        if not values["nesterov"] or (values["momentum"] > 0 and values["dampening"] == 0):
            return []
        got = f"momentum={values['momentum']}, dampening={values['dampening']}"
        return [f"nesterov=True needs a momentum and no dampening; got {got}"]

    def has_kernel(self, parameters: list[Tensor]) -> bool:
        """Those that `torch.optim.SGD` fuses, but for halves on a CPU."""
        # With torch 2.13 that kernel leaves most elements as they are (pytorch issue 191763).
        first = parameters[0]
        is_broken = first.device.type == "cpu" and first.dtype in (torch.float16, torch.bfloat16)
        return fused.has_kernel(parameters) and not is_broken

    def moments(self, values: Values) -> tuple[str, ...]:
        """The buffer, if a member has momentum."""
        return ("momentum_buffer",) if values.columns["momentum"].any() else ()

    def counted(self, values: Values) -> Array:
        """Steps with momentum: whether there were any tells if the buffer holds something."""
        return (values.columns["momentum"] > 0).astype(np.float64)

    def phase(self, steps: Steps) -> Steps:
        """Whether the buffer holds something."""
        return np.minimum(steps, 1)

    def coefficients(self, values: Values, steps: Array) -> dict[str, Array]:
        """Those of the gradient and of the momentum."""
        of = values.columns
        has_begun = steps > 0
        keep = np.where(has_begun, of["momentum"], 0)
        take = np.where(has_begun, 1 - of["dampening"], 1)
        tail = momentum.momentum_coefficients(values, keep, take, of["nesterov"])
        return momentum.gradient_coefficients(values) | tail

    def passes(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        coefficients: Mapping[str, Tensor],
        scratch: Scratch,
    ) -> None:
        """Update one block of members."""
        gradient = descent(parameter, gradient, coefficients, scratch[0])
        momentum.apply(parameter, gradient, state, coefficients)

    def fused(
        self,
        parameters: Tensors,
        gradients: Tensors,
        state: Mapping[str, Tensors],
        values: Values,
        member: int,
        done: float,
    ) -> None:
        """Update with torch's kernel."""
        fused.sgd(parameters, gradients, state, values, member, done)
