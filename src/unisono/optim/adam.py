"""The update of Adam and AdamW.

References:
    https://arxiv.org/abs/1412.6980 (Adam), https://arxiv.org/abs/1711.05101 (AdamW),
    https://openreview.net/forum?id=ryQu7f-RZ (AMSGrad),
    https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from unisono.optim import fused
from unisono.optim.elementwise import Scratch, descent
from unisono.optim.fused import Tensors
from unisono.optim.hyperparameters import Array, Hyperparameter, Steps, Values, at_least_zero, flag
from unisono.optim.paths import Method


class AdamMethod(Method):
    """``p -= lr * m / (sqrt(v) + eps)``, with bias-corrected averages m of g and v of g^2.

    Args:
        name: The name of the optimizer.
    """

    hyperparameters = (
        at_least_zero("lr"),
        Hyperparameter(
            "betas",
            "pair",
            lambda pair: all(0 <= beta < 1 for beta in pair),
            "a pair of numbers of at least 0 and less than 1",
        ),
        at_least_zero("eps"),
        at_least_zero("weight_decay"),
        flag("amsgrad"),
        flag("maximize"),
        flag("decoupled_weight_decay"),
    )

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]

    def has_kernel(self, parameters: list[Tensor]) -> bool:
        """Those that `torch.optim.Adam` fuses."""
        return fused.has_kernel(parameters)

    def moments(self, values: Values) -> tuple[str, ...]:
        """Both averages, and the largest second one if a member asks for it."""
        largest = ("max_exp_avg_sq",) if values.columns["amsgrad"].any() else ()
        return ("exp_avg", "exp_avg_sq", *largest)

    def counted(self, values: Values) -> Array:
        """Each step."""
        return np.ones(1)

    def phase(self, steps: Steps) -> Steps:
        """The number of steps, by which the averages are corrected."""
        return steps

    def coefficients(self, values: Values, steps: Array) -> dict[str, Array]:
        """``p += rate * m / (sqrt(v) + eps)`` with ``m += weight1 * (g - m)``, likewise v.

        The root of the second bias correction is part of ``rate`` and ``eps``.
        """
        of = values.columns
        correction1 = 1 - of["beta1"] ** (steps + 1)
        root2 = np.sqrt(1 - of["beta2"] ** (steps + 1))
        decoupled = of["decoupled_weight_decay"]
        found = {
            "weight1": 1 - of["beta1"],
            "weight2": 1 - of["beta2"],
            "eps": of["eps"] * root2,
            "rate": -of["lr"] / correction1 * root2,
        }
        if of["maximize"].any():
            found["sign"] = 1 - 2 * of["maximize"]
        decay = of["weight_decay"] * (1 - decoupled)
        if decay.any():
            found["decay"] = decay
        shrink = of["lr"] * of["weight_decay"] * decoupled
        if shrink.any():
            found["shrink"] = 1 - shrink
        if of["amsgrad"].any():
            found["amsgrad"] = of["amsgrad"]
        if not of["amsgrad"].all():
            found["plain"] = 1 - of["amsgrad"]
        return found

    def passes(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        coefficients: Mapping[str, Tensor],
        scratch: Scratch,
    ) -> None:
        """Update one block of members."""
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        room, _ = scratch  # one for all of it keeps a block in the cache
        descended = descent(parameter, gradient, coefficients, room)
        if "shrink" in coefficients:
            parameter.mul_(coefficients["shrink"])
        mean.lerp_(descended, coefficients["weight1"])
        torch.mul(descended, descended, out=room)
        square.lerp_(room, coefficients["weight2"])
        torch.sqrt(_under_root(state, coefficients, room), out=room)
        room.add_(coefficients["eps"]).div_(coefficients["rate"])
        parameter.addcdiv_(mean, room)

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
        fused.adam(parameters, gradients, state, values, member, done)


def _under_root(
    state: Mapping[str, Tensor], coefficients: Mapping[str, Tensor], scratch: Tensor
) -> Tensor:
    """v, or the largest v so far for members with AMSGrad."""
    square = state["exp_avg_sq"]
    if "amsgrad" not in coefficients:
        return square
    largest = state["max_exp_avg_sq"]
    if "plain" not in coefficients:
        return torch.maximum(largest, square, out=largest)
    # Factors of 0 and 1 choose exactly: v is never negative, so others' rows of zeros stay.
    torch.mul(square, coefficients["amsgrad"], out=scratch)
    torch.maximum(largest, scratch, out=largest)
    torch.mul(square, coefficients["plain"], out=scratch)
    return scratch.addcmul_(largest, coefficients["amsgrad"])
