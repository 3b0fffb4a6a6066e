"""Temperatures from held-out data: of each member, and of the members' common prediction.

A network says 99 % where it is right in 90 % of the cases; a temperature, one number that all
logits are divided by, takes that back and changes no decision. Pure functions of logits on data
that no member was trained on; `ens.combination` keeps the temperatures with the ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from unisono import collectives, held_out, member_axis

LOWEST: Final = 0.01
HIGHEST: Final = 100.0

_MOST_STEPS: Final = 100
_CLOSE: Final = 1e-7  # of a logarithm
_CHUNK: Final = 2**22  # logits that are looked at together, in float64: 32 MB


def member_temperatures(logits: Tensor, targets: Tensor, *, dim: int = -1) -> Tensor:
    """Find each member's temperature: ``T[i] = argmin_T mean_b NLL(softmax(z[i, b] / T), y_b)``.

    The negative log-likelihood is convex in 1/T, and the minimum of every member is found at once.
    It may lie at the border: a member that tells the classes apart without a mistake gains from
    ever lower temperatures, one that is worse than chance from ever higher ones. So temperatures
    are kept within `LOWEST` = 0.01 and `HIGHEST` = 100. Where all are equally good, T is 1.

    Members are sharpened or softened each by itself; averaging them afterwards softens once more,
    which `pooled_temperature` takes back.

    Args:
        logits: Logits, or log-probabilities, of all members on held-out data. -inf is a class that
            is impossible. One logit z for two classes is ``torch.stack([0 * z, z], -1)``.
        targets: The true classes.
        dim: The class axis of the logits.

    Returns:
        The temperatures, for `apply` and `ens.combination.set`; float32 at least.

    Shape:
        - logits: (N, B, C)
        - targets: (B)
        - returns: (N)

    Raises:
        ValueError: If shapes don't fit, classes are out of range, logits are NaN or +inf, or a
            member takes a true class for impossible, which no temperature makes up for.
        TypeError: If logits or targets aren't tensors of the right kind.

    Example:
        >>> logits = torch.log(torch.tensor([[0.8, 0.2]] * 10))
        >>> y = torch.tensor([0] * 8 + [1] * 2)  # 80 % of the first class, as predicted
        >>> member_temperatures(torch.stack([logits, 3 * logits]), y)
        tensor([1., 3.])

    Reference: Guo et al., On Calibration of Modern Neural Networks, 2017,
        https://arxiv.org/abs/1706.04599
    """
    call = "calibration.member_temperatures"
    logits = held_out.check_outputs(call, logits, minus_infinity=True)
    return _fit(call, *held_out.class_rows(call, logits, targets, dim))


def pooled_temperature(
    logits: Tensor,
    targets: Tensor,
    *,
    weights: Tensor | Sequence[float] | None = None,
    temperatures: Tensor | Sequence[float] | None = None,
    dim: int = -1,
) -> Tensor:
    """Find the temperature of the common prediction: first pool, then calibrate.

    ``T = argmin_T mean_b NLL(softmax(log pooled[b] / T), y_b)`` with
    ``pooled = sum_i w[i] softmax(z[i] / T[i])``. An average of probabilities is less sure than its
    members, so members that are calibrated make an average that is not: its temperature is mostly
    below 1. This one is fitted to the average itself, in which it differs from one temperature
    for all members; and its minimum is one, as the negative log-likelihood is convex in 1/T.

    Args:
        logits: Logits, or log-probabilities, of all members on held-out data.
        targets: The true classes.
        weights: The members' weights in the average; None for equal ones.
        temperatures: The members' own temperatures, which come first; None for none.
        dim: The class axis of the logits.

    Returns:
        The temperature, within `LOWEST` and `HIGHEST` as for `member_temperatures`.

    Shape:
        - logits: (N, B, C)
        - targets: (B)
        - weights, temperatures: (N)
        - returns: ()

    Raises:
        ValueError: As for `member_temperatures`, or if there aren't N weights or temperatures.
        TypeError: If logits or targets aren't tensors of the right kind.

    Example:
        >>> logits = torch.log(torch.tensor([[[0.9, 0.1]] * 10, [[0.1, 0.9]] * 10]))
        >>> y = torch.tensor([0] * 5 + [1] * 5)
        >>> pooled_temperature(logits, y)  # the average is 50 % and right
        tensor(1.)

    Reference: Rahaman and Thiery, Uncertainty Quantification and Deep Ensembles, 2021,
        https://arxiv.org/abs/2007.08792
    """
    call = "calibration.pooled_temperature"
    logits = held_out.check_outputs(call, logits, minus_infinity=True)
    rows, classes = held_out.class_rows(call, logits, targets, dim)
    pooled = pool(rows, weights=weights, temperatures=temperatures)
    return _fit(call, pooled.unsqueeze(0), classes).squeeze(0)


def apply(logits: Tensor, temperatures: Tensor | Sequence[float] | float) -> Tensor:
    """Divide by temperatures: ``z[i] / T[i]``, or ``z / T`` for a single one.

    ``logits / T`` by itself would divide class c by ``T[c]`` where there are as many classes as
    members.

    Args:
        logits: Logits of all members.
        temperatures: One for each member, or one for all.

    Returns:
        The logits, of the same dtype; half precision is divided in float32.

    Shape:
        - logits: (N, *)
        - temperatures: (N) or ()
        - returns: (N, *)

    Raises:
        ValueError: If there aren't as many temperatures as members.

    Example:
        >>> apply(torch.ones(2, 1, 2), torch.tensor([1.0, 4.0]))[1]
        tensor([[0.2500, 0.2500]])
    """
    temperatures = torch.as_tensor(temperatures)
    shape = tuple(temperatures.shape)
    if shape and shape != tuple(logits.shape[:1]):
        raise ValueError(
            f"calibration.apply: logits of shape {tuple(logits.shape)} need {len(logits)}"
            f" temperatures, one for each member, or a single one of shape (); got shape {shape}"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    temperatures = temperatures.to(logits.device, wide)
    if shape:
        temperatures = temperatures.reshape(-1, *[1] * (logits.ndim - 1))
    return (logits / temperatures).to(logits.dtype)


def pool(
    logits: Tensor,
    *,
    weights: Tensor | Sequence[float] | None = None,
    temperatures: Tensor | Sequence[float] | None = None,
    dim: int = -1,
    mesh: DeviceMesh | None = None,
) -> Tensor:
    """Average the members' probabilities, as a logarithm: ``log sum_i w[i] softmax(z[i] / T[i])``.

    The logarithm of the average is never taken of a rounded zero. Half precision is computed, and
    returned, in float32.

    Args:
        logits: Logits, or log-probabilities, of all members.
        weights: The members' weights; they needn't sum to one. None for equal ones.
        temperatures: The members' temperatures, or one for all; None for none.
        dim: The class axis of the logits.
        mesh: The ranks that the members are spread over; then all that is given is of this rank's
            members, and the result is that of all.

    Returns:
        Log-probabilities, float32 at least.

    Shape:
        - logits: (N, *, C)
        - weights, temperatures: (N)
        - returns: (*, C)

    Raises:
        ValueError: If there is no class axis `dim`, or there aren't N weights or temperatures.

    Example:
        >>> pool(torch.tensor([[[0.0, 0.0]], [[0.0, -torch.inf]]])).exp()
        tensor([[0.7500, 0.2500]])
    """
    dim = member_axis.class_axis("calibration.pool", logits, dim)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperatures is not None:
        logits = apply(logits, temperatures)
    group = collectives.member_group("calibration.pool", mesh)
    shares = None
    if weights is not None:
        shares = member_axis.shares("calibration.pool", weights, logits, group)
    return member_axis.log_mean(logits.log_softmax(dim), shares, group)


def _fit(call: str, rows: Tensor, classes: Tensor) -> Tensor:
    """The temperatures of N predictions: safeguarded Newton steps on log(1/T), for all at once.

    Shape:
        - rows: (N, M, C)
        - classes: (M)
        - returns: (N)
    """
    index = classes.expand(len(rows), -1).unsqueeze(-1)
    impossible = rows.gather(-1, index).isneginf().flatten(1).sum(1)
    if bool(impossible.any()):
        facts = [f"member {i}: {k}" for i, k in enumerate(impossible.tolist()) if k]
        raise ValueError(
            f"{call}: a logit of -inf, or a probability of zero, stands at the true class of some"
            f" rows, which makes the loss infinite at every temperature ({', '.join(facts)} of"
            f" {len(classes)} rows); pass logits, or probabilities.clamp_min(1e-12).log()"
        )
    exact = torch.float32 if rows.device.type == "mps" else torch.float64
    low, high = (
        torch.full((len(rows),), 1 / t, dtype=exact, device=rows.device).log()
        for t in (HIGHEST, LOWEST)
    )
    at_low, at_high = (_slope(rows, index, u.exp())[0] for u in (low, high))
    # Beyond the border the loss goes on falling, until it is zero to the last bit.
    falling, rising = (at_high <= 0) & (at_low < 0), at_low > 0
    low, high = torch.where(falling, high, low), torch.where(rising, low, high)
    u = torch.zeros_like(low).clamp(low, high)
    last = torch.full_like(u, torch.inf)
    for _ in range(_MOST_STEPS):
        beta = u.exp()
        slope, curvature = _slope(rows, index, beta)
        low, high = torch.where(slope < 0, u, low), torch.where(slope > 0, u, high)
        newton = u - torch.where(slope == 0, 0.0, slope / (beta * curvature))
        # Bisect where Newton leaves the bracket, or gains little and isn't there yet.
        gains = (slope.abs() <= 0.5 * last) | ((newton - u).abs() <= _CLOSE)
        good = (newton >= low) & (newton <= high) & gains
        new = torch.where(good, newton, (low + high) / 2)
        done = (new - u).abs().amax() <= _CLOSE
        u, last = new, slope.abs()
        if bool(done):
            break
    return (-u).exp().to(torch.promote_types(rows.dtype, torch.float32))


def _slope(rows: Tensor, index: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of the mean NLL of softmax(beta z) by beta, each (N)."""
    n, m, classes = rows.shape
    beta = beta.reshape(n, 1, 1)
    first, second = torch.zeros(2, n, dtype=beta.dtype, device=rows.device)
    size = max(1, _CHUNK // (n * classes))
    for z, y in zip(torch.split(rows, size, 1), torch.split(index, size, 1), strict=True):
        z = z.to(beta.dtype)
        z = z - z.gather(-1, y)  # so the true class stands at zero
        p = (beta * z).softmax(-1)
        z = z.masked_fill(z.isneginf(), 0.0)  # where p is zero
        mean = (p * z).sum(-1, keepdim=True)
        first = first + mean.sum((1, 2))
        second = second + (p * (z - mean).square()).sum((1, 2))
    return first / m, second / m
