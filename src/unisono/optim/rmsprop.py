"""The update of RMSprop.

References:
    https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf,
    https://docs.pytorch.org/docs/stable/generated/torch.optim.RMSprop.html
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from unisono.optim import momentum
from unisono.optim.elementwise import Scratch, descent
from unisono.optim.hyperparameters import Array, Steps, Values, at_least_zero, flag
from unisono.optim.paths import Method


class RMSpropMethod(Method):
    """``p -= lr * g / (sqrt(v) + eps)`` with an average v of g^2, or of its variance."""

    name = "RMSprop"
    hyperparameters = (
        at_least_zero("lr"),
        at_least_zero("alpha"),
        at_least_zero("eps"),
        at_least_zero("weight_decay"),
        at_least_zero("momentum"),
        flag("centered"),
        flag("maximize"),
    )

    def has_kernel(self, parameters: list[Tensor]) -> bool:
        """There is none."""
        return False

    def moments(self, values: Values) -> tuple[str, ...]:
        """The average, and what members with momentum or centring need."""
        buffer = ("momentum_buffer",) if values.columns["momentum"].any() else ()
        mean = ("grad_avg",) if values.columns["centered"].any() else ()
        return ("square_avg", *buffer, *mean)

    def counted(self, values: Values) -> Array:
        """Each step."""
        return np.ones(1)

    def phase(self, steps: Steps) -> Steps:
        """Nothing: all averages start from zero and aren't corrected."""
        return np.zeros_like(steps)

    def coefficients(self, values: Values, steps: Array) -> dict[str, Array]:
        """``v += weight * (g^2 - v)``, and those of gradient and momentum."""
        of = values.columns
        found = {"weight": 1 - of["alpha"], "eps": of["eps"]}
        if of["centered"].any():
            found["weight_mean"] = found["weight"] * of["centered"]
            found["centered"] = -of["centered"]
        one, none = np.ones(1), np.zeros(1)
        tail = momentum.momentum_coefficients(values, of["momentum"], one, none)
        return found | momentum.gradient_coefficients(values) | tail

    def passes(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        coefficients: Mapping[str, Tensor],
        scratch: Scratch,
    ) -> None:
        """Update one block of members."""
        square, room = state["square_avg"], scratch[1]
        gradient = descent(parameter, gradient, coefficients, scratch[0])
        torch.mul(gradient, gradient, out=room)
        square.lerp_(room, coefficients["weight"])
        if "centered" in coefficients:
            mean = state["grad_avg"].lerp_(gradient, coefficients["weight_mean"])
            torch.mul(mean, coefficients["centered"], out=room)
            room.mul_(mean).add_(square).sqrt_()
        else:
            torch.sqrt(square, out=room)
        room.add_(coefficients["eps"])
        torch.div(gradient, room, out=room)
        momentum.apply(parameter, room, state, coefficients)
