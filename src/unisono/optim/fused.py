"""torch's fused kernels: one pass over a parameter and its state, with equal values for all.

The only file of this package that knows names which torch keeps for `torch.optim`.

Reference: https://docs.pytorch.org/docs/stable/optim.html
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from unisono.optim.hyperparameters import Values

Tensors = list[Tensor] | tuple[Tensor, ...]  # what the kernels take for a list
_PLAIN = (Tensor, torch.nn.Parameter)


def has_kernel(parameters: list[Tensor]) -> bool:
    """Whether torch's fused kernels take these parameters, all on one device and of one dtype."""
    return (
        all(type(parameter) in _PLAIN for parameter in parameters)
        and parameters[0].is_floating_point()
        and parameters[0].device.type in _get_fused_kernels_supported_devices()
    )


def add_to_all(tensors: list[Tensor], value: float | Tensor) -> None:
    """Add to each of the tensors, in place."""
    if isinstance(value, Tensor):
        torch._foreach_add_(tensors, [value] * len(tensors))
    else:
        torch._foreach_add_(tensors, value)


def adam(
    parameters: Tensors,
    gradients: Tensors,
    state: Mapping[str, Tensors],
    values: Values,
    member: int,
    done: float,
) -> None:
    """Update with `torch.optim.Adam`'s kernel.

    It reads by address: gradients and state have the strides of their parameter.

    Args:
        parameters: All on one device and of one dtype.
        gradients: One for each.
        state: Lists of what is in the state of each.
        values: The hyperparameters.
        member: Whose hyperparameters.
        done: The number of steps that the member has done.
    """
    step = torch.full((), done + 1, dtype=torch.float32, device=parameters[0].device)
    amsgrad = bool(values.number("amsgrad", member))
    is_decoupled = values.number("decoupled_weight_decay", member)
    kernel = torch._fused_adamw_ if is_decoupled else torch._fused_adam_
    kernel(
        parameters,
        gradients,
        state["exp_avg"],
        state["exp_avg_sq"],
        state["max_exp_avg_sq"] if amsgrad else [],
        [step] * len(parameters),
        lr=values.number("lr", member),
        beta1=values.number("beta1", member),
        beta2=values.number("beta2", member),
        weight_decay=values.number("weight_decay", member),
        eps=values.number("eps", member),
        amsgrad=amsgrad,
        maximize=bool(values.number("maximize", member)),
    )


def sgd(
    parameters: Tensors,
    gradients: Tensors,
    state: Mapping[str, Tensors],
    values: Values,
    member: int,
    done: float,
) -> None:
    """Update with `torch.optim.SGD`'s kernel, as `adam` does with its own.

    Args:
        parameters: As for `adam`.
        gradients: As for `adam`.
        state: As for `adam`.
        values: As for `adam`.
        member: As for `adam`.
        done: The number of steps with momentum that the member has done.
    """
    momentum = values.number("momentum", member)
    torch._fused_sgd_(
        parameters,
        gradients,
        state["momentum_buffer"] if momentum else [],
        weight_decay=values.number("weight_decay", member),
        momentum=momentum,
        lr=values.number("lr", member),
        dampening=values.number("dampening", member),
        nesterov=bool(values.number("nesterov", member)),
        maximize=bool(values.number("maximize", member)),
        is_first_step=not done,
    )
