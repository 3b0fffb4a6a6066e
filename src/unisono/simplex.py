"""The minimum of a smooth convex function over weights that are not negative and sum to one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Derivatives = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Weights, all above zero -> gradient (N,) and Hessian (N, N)."""

_MOST_STEPS = 200
_SMALL = 1e-5


def minimise(derivatives: Derivatives, start: Tensor, *, tolerance: float, call: str) -> Tensor:
    """Minimise a convex function over the simplex, to a gap that is known.

    For a convex f, ``f(w) - min f <= gap(w) = w . grad f(w) - min_i grad f(w)[i]``. The steps are
    Newton steps on the optimality conditions with ``w[i] z[i] = 1/t`` and growing t, a primal-dual
    interior-point method, which takes 10 to 30 of them whatever N is. Of equally good
    weights it finds the most even ones, so the result doesn't depend on the order of the members.

    Args:
        derivatives: Gradient and Hessian of f.
        start: Weights above zero, of the dtype and on the device to compute in.
        tolerance: The gap to reach.
        call: Name of the public function, for the message.

    Returns:
        The weights; those that go to zero are zero.

    Raises:
        ValueError: If the gap isn't reached, which happens when it is below rounding.

    Reference: Boyd and Vandenberghe, Convex Optimization, 2004, section 11.7,
        https://web.stanford.edu/~boyd/cvxbook/
    """
    w, z = start, torch.ones_like(start)
    nu = torch.zeros_like(start[:1])
    gradient, hessian = derivatives(w)
    for _ in range(_MOST_STEPS):
        # Further than is asked for, so that what is left of the zero weights may be dropped.
        if bool(torch.maximum(_gap(w, gradient), w @ z) <= 0.1 * tolerance):
            return _without_the_smallest(derivatives, w, z, tolerance)
        one_over_t = (w @ z) / (10 * len(w))
        dw, dz, dnu = _newton(w, z, nu, gradient, hessian, one_over_t)
        size = 1.0
        for values, change in ((z, dz), (w, dw)):
            shrinking = change < 0
            if bool(shrinking.any()):
                most = float((-values[shrinking] / change[shrinking]).min())
                size = min(size, 0.99 * most)
        before = _residual(w, z, nu, gradient, one_over_t)
        while True:
            tried = (w + size * dw, z + size * dz, nu + size * dnu)
            new_gradient, new_hessian = derivatives(tried[0])
            after = _residual(*tried, new_gradient, one_over_t)
            if bool(after <= (1 - 0.01 * size) * before) or size < 1e-10:
                break
            size /= 2
        (w, z, nu), gradient, hessian = tried, new_gradient, new_hessian
    raise ValueError(
        f"{call}: the loss is within {float(_gap(w, gradient)):.1e} of its minimum after"
        f" {_MOST_STEPS} steps and comes no closer, but tolerance={tolerance:.1e}; allow more"
    )


def _newton(
    w: Tensor, z: Tensor, nu: Tensor, gradient: Tensor, hessian: Tensor, one_over_t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The step towards ``grad f - z + nu = 0``, ``w z = 1/t`` and ``sum w = 1``."""
    n = len(w)
    matrix = torch.zeros(n + 1, n + 1, dtype=w.dtype, device=w.device)
    matrix[:n, :n] = hessian + torch.diag(z / w)
    matrix[:n, n] = matrix[n, :n] = 1
    right = torch.cat([-(gradient + nu - one_over_t / w), 1 - w.sum().reshape(1)])
    step = torch.linalg.solve(matrix, right)
    dw = step[:n]
    return dw, (one_over_t - z * dw) / w - z, step[n:]


def _residual(w: Tensor, z: Tensor, nu: Tensor, gradient: Tensor, one_over_t: Tensor) -> Tensor:
    parts = [gradient - z + nu, w * z - one_over_t, (w.sum() - 1).reshape(1)]
    return torch.cat(parts).square().sum().sqrt()


def _gap(w: Tensor, gradient: Tensor) -> Tensor:
    return w @ gradient - gradient.min()


def _without_the_smallest(
    derivatives: Derivatives, w: Tensor, z: Tensor, tolerance: float
) -> Tensor:
    """The weights with zero where they go to zero, if these are as good."""
    rounded = torch.where((w < _SMALL) & (w < z), 0.0, w)
    rounded = rounded / rounded.sum()
    gap = _gap(rounded, derivatives(rounded)[0])
    return rounded if bool(gap <= tolerance) else w / w.sum()
