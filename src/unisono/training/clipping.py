"""Clipping of gradients, each member by itself: what N solo trainings would do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unisono.ensemble import Ensemble
from unisono.errors import EnsembleError

PerMemberNumber = float | Sequence[float] | np.ndarray[Any, Any] | Tensor
"""A number for all members, or one for each."""

_NUMBERS: Final = (int, float, np.number, np.ndarray, Sequence, Tensor)
_EPSILON: Final = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@torch.no_grad()
def clip_grad_norm_(
    ens: Ensemble,
    max_norm: PerMemberNumber,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    shared_max_norm: float | None = None,
) -> Tensor:
    """Scale each member's gradients, in place, so that their norm is at most ``max_norm``.

    ``grad[i] *= min(1, max_norm[i] / (norm[i] + 1e-6))``, where ``norm[i]`` is the norm of all
    gradients of member i as one vector. That is `torch.nn.utils.clip_grad_norm_` of every member
    by itself, in a few passes for all of them. Torch's own function, given ``ens.parameters()``,
    would take one norm over all members: they would scale each other's gradients.

    A member whose gradients hold NaN or infinities does not touch the others. Nothing waits for the
    device, except for ``error_if_nonfinite``.

    Args:
        ens: The ensemble, after ``backward``.
        max_norm: The largest norm, a number or one for each member. Infinity does not clip.
        norm_type: The order of the norm, as for torch; ``inf`` for the largest magnitude.
        error_if_nonfinite: Whether to raise, before anything is changed, if the norm of any
            member isn't finite.
        shared_max_norm: For parameters that are shared by all members. Their gradient is the sum
            of what the members want and belongs to none of them, so it is no part of any member's
            norm: together they are clipped to this norm of their own. Infinity leaves them as they
            are. None raises if one of them has a gradient.

    Returns:
        The norm of each member's gradients before clipping, on the device of the parameters; zeros
        if there are no gradients.

    Shape:
        - max_norm: () or (N)
        - returns: (N)

    Raises:
        ValueError: If ``max_norm`` isn't one number or N, or one is negative.
        EnsembleError: If shared parameters have gradients and ``shared_max_norm`` isn't given.
        RuntimeError: If ``error_if_nonfinite``, and a norm isn't finite.
        TypeError: If a gradient is sparse, or ``max_norm`` no number.

    Example:
        >>> ens = Ensemble([torch.nn.Linear(3, 1) for _ in range(5)])
        >>> ens(torch.randn(8, 3)).square().mean((1, 2)).sum().backward()
        >>> norms = clip_grad_norm_(ens, 1.0)
        >>> norms.shape
        torch.Size([5])

    Reference:
        `<https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html>`_
    """
    call = "clip_grad_norm_"
    limit = _checked(call, "max_norm", max_norm, len(ens))
    grads = _gradients(call, ens)
    if grads.shared and shared_max_norm is None:
        raise EnsembleError(_shared_text(call, "shared_max_norm", grads.shared, len(ens)))
    shared_limit = _checked_number(call, "shared_max_norm", shared_max_norm)
    norms = _norms(list(grads.own.values()), float(norm_type), ens)
    shared_norm = _norm_of_all(list(grads.shared.values()), float(norm_type))
    if error_if_nonfinite:
        _refuse_nonfinite(norms, shared_norm, float(norm_type))
    _scale_(grads.own.values(), norms, limit)
    if shared_norm is not None and shared_limit is not None:
        _scale_(grads.shared.values(), shared_norm, shared_limit)
    return norms


@torch.no_grad()
def clip_grad_value_(
    ens: Ensemble, clip_value: PerMemberNumber, *, shared_clip_value: float | None = None
) -> None:
    """Clip every element of each member's gradients to ``[-clip_value, clip_value]``, in place.

    ``grad[i] = clamp(grad[i], -clip_value[i], clip_value[i])``: what
    `torch.nn.utils.clip_grad_value_` does to every member by itself.

    Args:
        ens: The ensemble, after ``backward``.
        clip_value: The largest magnitude, a number or one for each member.
        shared_clip_value: The same for parameters that are shared by all members. None takes
            ``clip_value`` if that is one number, and else raises if one of them has a gradient.

    Shape:
        - clip_value: () or (N)

    Raises:
        ValueError: If ``clip_value`` isn't one number or N, or one is negative.
        EnsembleError: If shared parameters have gradients, members have values of their own, and
            ``shared_clip_value`` isn't given.
        TypeError: If a gradient is sparse, or ``clip_value`` no number.

    Example:
        >>> ens = Ensemble([torch.nn.Linear(3, 1) for _ in range(2)])
        >>> ens(torch.randn(8, 3)).sum().backward()
        >>> clip_grad_value_(ens, [0.5, 0.1])
        >>> ens.members.bias.grad
        tensor([[0.5000],
                [0.1000]])

    Reference:
        `<https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_value_.html>`_
    """
    call = "clip_grad_value_"
    limit = _checked(call, "clip_value", clip_value, len(ens))
    grads = _gradients(call, ens)
    shared_limit: float | Tensor | None = limit
    if shared_clip_value is not None or _is_per_member(limit):
        shared_limit = _checked_number(call, "shared_clip_value", shared_clip_value)
    if grads.shared and shared_limit is None:
        raise EnsembleError(_shared_text(call, "shared_clip_value", grads.shared, len(ens)))
    for grad in grads.own.values():
        _clamp_(grad, limit)
    for grad in grads.shared.values():
        _clamp_(grad, shared_limit)


class _Gradients(NamedTuple):
    """The gradients there are, by name in ``ens.members``; tied parameters once."""

    own: dict[str, Tensor]  # (N, *)
    shared: dict[str, Tensor]


def _gradients(call: str, ens: Ensemble) -> _Gradients:
    every = ens.members.named_parameters(remove_duplicate=False)
    shared_ids = {id(parameter) for name, parameter in every if name in ens.shared}
    found = _Gradients({}, {})
    for name, parameter in ens.members.named_parameters():
        if parameter.grad is not None:
            kind = found.shared if id(parameter) in shared_ids else found.own
            kind[name] = parameter.grad
    sparse = [
        f"  `{name}`: {grad.layout}"
        for name, grad in {**found.own, **found.shared}.items()
        if grad.layout is not torch.strided
    ]
    if sparse:
        raise TypeError(
            f"{call}: gradients are dense tensors, but these are sparse:\n\n"
            + "\n".join(sparse)
            + "\n\nBuild their layers with sparse=False."
        )
    return found


def _norms(grads: Sequence[Tensor], order: float, ens: Ensemble) -> Tensor:
    """The norm of each member's gradients, taken as torch does: of the norms of the tensors."""
    if not grads:
        first = next(ens.parameters(), None)
        return torch.zeros(len(ens), device=None if first is None else first.device)
    device = grads[0].device
    norms = [_norm_per_member(grad, order).to(device) for grad in grads]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), order, dim=0)
    return total


def _norm_per_member(grad: Tensor, order: float) -> Tensor:
    """(N, *) -> (N), over the axes as they lie in memory: flattening might copy."""
    grad = grad.unsqueeze(1) if grad.dim() == 1 else grad
    norm: Tensor = torch.linalg.vector_norm(grad, order, dim=tuple(range(1, grad.dim())))
    return norm


def _norm_of_all(grads: Sequence[Tensor], order: float) -> Tensor | None:
    return torch.nn.utils.get_total_norm(grads, order) if grads else None


def _scale_(grads: Iterable[Tensor], norms: Tensor, limit: float | Tensor) -> None:
    """Multiply by min(1, limit / norm); by one, too, for a condition would wait for the device."""
    if isinstance(limit, Tensor):
        limit = _moved(limit, norms.device, torch.promote_types(norms.dtype, torch.float32))
    factors = (limit / (norms + _EPSILON)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(_beside(factors.to(grad.device, non_blocking=True), grad))


def _clamp_(grad: Tensor, limit: Any) -> None:
    if isinstance(limit, Tensor):
        limit = _beside(_moved(limit, grad.device, grad.dtype), grad)
    grad.clamp_(-limit, limit)


def _moved(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rounded where it is, then moved: some devices have no float64."""
    return values.to(dtype).to(device, non_blocking=True)


def _beside(values: Tensor, grad: Tensor) -> Tensor:
    """Values of the members (N), or one for all (), that broadcast with (N, *)."""
    return values.reshape(-1, *[1] * (grad.dim() - 1)) if values.dim() else values


def _is_per_member(limit: float | Tensor) -> bool:
    return isinstance(limit, Tensor) and limit.dim() > 0


def _checked(call: str, name: str, value: PerMemberNumber, n: int) -> float | Tensor:
    """The limit as a number, or as a tensor; tensors of a device are not read."""
    if isinstance(value, bool | str | bytes) or not isinstance(value, _NUMBERS):
        raise TypeError(f"{call}: {name} is a number or one for each member, got {value!r}")
    shape = tuple(value.shape) if isinstance(value, Tensor) else np.shape(value)
    if shape not in ((), (n,)):
        raise ValueError(
            f"{call}: {name} is a number or one for each of the {n} members, got shape {shape}; "
            f"write {call}(ens, 1.0) or {call}(ens, [1.0] * {n})"
        )
    if isinstance(value, Tensor):
        return value.detach()
    numbers = [float(number) for number in np.asarray(value).reshape(-1)]
    _check_numbers(call, name, numbers, f"{name}[{{i}}]" if shape else name)
    return torch.tensor(numbers, dtype=torch.float64, device="cpu") if shape else numbers[0]


def _checked_number(call: str, name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise TypeError(f"{call}: {name} is one number, got {value!r}")
    _check_numbers(call, name, [float(value)], name)
    return float(value)


def _check_numbers(call: str, name: str, numbers: Sequence[float], label: str) -> None:
    wrong = [
        f"{label.format(i=i)} is {number}"
        for i, number in enumerate(numbers)
        if math.isnan(number) or number < 0
    ]
    if wrong:
        raise ValueError(f"{call}: {name} is zero or more, but {', '.join(wrong)}")


def _refuse_nonfinite(norms: Tensor, shared_norm: Tensor | None, order: float) -> None:
    facts = [
        f"  member {i}: {norm}" for i, norm in enumerate(norms.tolist()) if not math.isfinite(norm)
    ]
    if shared_norm is not None and not math.isfinite(shared := shared_norm.item()):
        facts.append(f"  the parameters shared by all members: {shared}")
    if facts:
        raise RuntimeError(
            f"clip_grad_norm_: norms of order {order} aren't finite, so nothing was clipped:\n\n"
            + "\n".join(facts)
            + "\n\nerror_if_nonfinite=False scales by them all the same; it spoils only the"
            " gradients of these members."
        )


def _shared_text(call: str, keyword: str, shared: Mapping[str, Tensor], n: int) -> str:
    facts = "\n".join(f"  `{name}`: {tuple(grad.shape)}" for name, grad in shared.items())
    return (
        f"{call}: each of the {n} members is clipped by itself, but these parameters are shared by"
        f" all members and have one gradient, which belongs to none:\n\n{facts}\n\n"
        f"Say what happens to them:\n\n"
        f"    {call}(ens, 1.0, {keyword}=1.0)           # clipped together, by themselves\n"
        f"    {call}(ens, 1.0, {keyword}=float('inf'))  # left as they are"
    )
