"""What the pure functions of stacked outputs share: checks, weights, and what members choose."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from unisono import member_reduction
from unisono.collectives import each_uses, raise_together


def check_shape(call: str, outputs: Tensor) -> None:
    """Raise unless `outputs` has members on axis 0.

    Args:
        call: The function that the user called, for the message.
        outputs: A tensor.
    """
    if outputs.ndim == 0:
        raise ValueError(f"{call}: axis 0 of the outputs is the member, but these have no axis")
    if outputs.shape[0] == 0:
        raise ValueError(
            f"{call}: outputs of shape {tuple(outputs.shape)} have no member on axis 0"
        )


def check_members(call: str, outputs: Tensor) -> None:
    """Raise unless `outputs` is a tensor with members on axis 0."""
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"{call}: expected one tensor of outputs, got {type(outputs).__name__}; "
            f"pass the tensor in it that holds the predictions"
        )
    check_shape(call, outputs)


def class_axis(call: str, logits: Tensor, dim: int) -> int:
    """Return the class axis counted from 0, or raise if `dim` isn't one."""
    shape = tuple(logits.shape)
    if logits.is_complex():
        raise TypeError(f"{call}: logits are real numbers, got {logits.dtype}")
    if logits.ndim < 2:
        raise ValueError(f"{call}: logits have a member axis and a class axis, got shape {shape}")
    if not -logits.ndim <= dim < logits.ndim:
        raise ValueError(f"{call}: dim={dim} is no axis of logits of shape {shape}")
    if dim % logits.ndim == 0:
        raise ValueError(
            f"{call}: dim={dim} is the member axis of logits of shape {shape}; "
            f"dim names the class axis"
        )
    if shape[dim] == 0:
        raise ValueError(f"{call}: logits of shape {shape} have no class on axis {dim}")
    return dim % logits.ndim


def shares(
    call: str,
    weights: Tensor | Sequence[float],
    outputs: Tensor,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Weights of the members as parts of one, shaped to be multiplied with the outputs.

    Args:
        call: The function that the user called, for the message.
        weights: One number per member.
        outputs: Outputs of the members; the shares lie where they lie.
        group: The ranks that hold the other members, each with the weights of its own.

    Returns:
        Shares of at least float32. Those of all ranks sum to one.

    Shape:
        - weights: (N,)
        - outputs: (N, *)
        - returns: (N, 1, ...), with as many axes as the outputs

    Raises:
        ValueError: If the weights aren't N finite numbers, none below zero and one above.
        TypeError: If they are complex.
    """
    n = outputs.shape[0]
    real = outputs.real.dtype if outputs.is_complex() else outputs.dtype
    wide = torch.promote_types(real, torch.float32)
    # Only what is read, with no wait for a device, can be wrong on one rank alone.
    is_read = not isinstance(weights, Tensor) or weights.device.type == "cpu"
    error = _wrong_weights(call, weights, n, group)
    raise_together(error, group if is_read else None, outputs.device)
    if isinstance(weights, Tensor):
        own = weights.to(device=outputs.device, dtype=wide)
    else:
        own = torch.tensor([float(w) for w in weights], device=outputs.device, dtype=wide)
    total = member_reduction.total(own, group)
    if group is not None and values_on_cpu(total.reshape(1)) == [0.0]:
        raise ValueError(f"{call}: the weights of the members on all ranks sum to zero")
    return (own / each_uses(total, group)).reshape(n, *[1] * (outputs.ndim - 1))


def values_on_cpu(tensor: Tensor) -> list[float] | None:
    """The elements of a tensor if reading them takes no wait for a device; else None."""
    if tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    try:
        values: list[float] = tensor.tolist()
    except RuntimeError:  # fake tensors, and tensors inside torch.func.vmap, have no values to read
        return None
    return values


def finite(log_p: Tensor) -> Tensor:
    """-inf as a number whose product with probability zero is zero, in gradients too."""
    # A quarter of the largest: sums of a few such numbers are finite.
    return log_p.clamp(min=torch.finfo(log_p.dtype).min / 4)


def log_mean(log_p: Tensor, w: Tensor | None, group: ProcessGroup | None = None) -> Tensor:
    """``log(sum_i w[i] exp(log_p[i]))``, without leaving the logarithms.

    Args:
        log_p: Logarithms of what is averaged over the members.
        w: `shares`, shaped to be multiplied with it; None for equal ones.
        group: The ranks that hold the other members.

    Shape:
        - log_p: (N, *)
        - returns: (*)
    """
    if w is None:
        return member_reduction.log_mean_exp(log_p, None, group)
    has_none = w == 0
    log_w = w.masked_fill(has_none, 1).log().masked_fill(has_none, -torch.inf)
    return member_reduction.log_mean_exp(log_p, finite(log_w), group)


def chosen(outputs: Tensor, dim: int) -> Tensor:
    """The class that each member chooses: its largest logit, of equals the lowest class.

    Args:
        outputs: Logits or probabilities; or labels of integer dtype, which are the choices.
        dim: The class axis; labels have none.

    Returns:
        The choices, int64; -1 (or any number below) where a member abstains, as with NaN.

    Shape:
        - outputs: (N, *, C), or labels (N, *)
        - returns: (N, *)
    """
    if outputs.is_floating_point():
        # Of equal values argmax takes the first: torch documents it.
        return outputs.argmax(dim).masked_fill(outputs.isnan().any(dim), -1)
    return outputs.long()


def counted_up(choices: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the choices of each element over the members, and count equal ones from 1 up.

    Memory is that of the choices, whatever the number of classes.

    Returns:
        The sorted choices, and for each the how-manieth of its class it is.

    Shape:
        - all: (N, *)

    Example:
        >>> ordered, count = counted_up(torch.tensor([7, 3, 7]))
        >>> ordered.tolist(), count.tolist()
        ([3, 7, 7], [1, 1, 2])
    """
    n = choices.shape[0]
    ordered = choices.sort(0).values  # equal choices stand together
    place = torch.arange(n, device=choices.device).reshape(n, *[1] * (choices.ndim - 1))
    first = torch.ones_like(ordered.narrow(0, 0, 1), dtype=torch.bool)
    begins = torch.cat([first, ordered.diff(dim=0) != 0])
    return ordered, place - (place * begins).cummax(0).values + 1


def _wrong_weights(
    call: str, weights: Tensor | Sequence[float], n: int, group: ProcessGroup | None
) -> Exception | None:
    """What is wrong with the weights of n members, as far as it takes no wait for a device."""
    shape = tuple(weights.shape) if isinstance(weights, Tensor) else (len(weights),)
    if shape != (n,):
        return ValueError(f"{call}: {n} members need weights of shape ({n},), got shape {shape}")
    if isinstance(weights, Tensor) and weights.is_complex():
        return TypeError(f"{call}: weights are real numbers, got {weights.dtype}")
    values = values_on_cpu(weights) if isinstance(weights, Tensor) else [float(w) for w in weights]
    for i, weight in enumerate(values or ()):
        if not (math.isfinite(weight) and weight >= 0):
            return ValueError(
                f"{call}: weights are finite and not negative, but weights[{i}] is {weight}"
            )
    if group is None and values is not None and not any(values):
        return ValueError(f"{call}: the {n} weights sum to zero")
    return None
