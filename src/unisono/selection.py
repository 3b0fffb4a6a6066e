"""Weights of the members from held-out data: greedy selection, and the best convex combination.

Pure functions of outputs on data that no member was trained on. The weights are for
`combine.weighted` of such outputs, and `ens.combination` keeps them with the ensemble.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Literal, SupportsIndex, get_args

import torch
from torch import Tensor

from unisono import held_out, simplex
from unisono.training.losses import member_losses

LossName = Literal["nll", "error", "squared_error"]
Loss = LossName | Callable[[Tensor, Tensor], Tensor]

# What a probability of zero counts as: the smallest normal float32. Its logarithm is -87.
_LEAST = torch.finfo(torch.float32).tiny


def greedy(
    outputs: Tensor,
    targets: Tensor,
    *,
    loss: Loss = "nll",
    steps: int = 100,
    start: int = 0,
    dim: int = -1,
) -> Tensor:
    """Add members one by one, each time the one that helps most: ``w[i] = count[i] / sum count``.

    Step k adds the member i for which ``loss((sum of the chosen + outputs[i]) / k)`` is least, of
    equal ones the lowest; a member may be added many times. What counts in the end are the first
    steps up to the one with the least loss, so the combination is never worse on these data than
    the best single member. Selection fits few numbers, and yet it fits: measure the gain on other
    data. All N candidates of a step are computed at once.

    Args:
        outputs: Outputs of all members on held-out data, such as are to be averaged: probabilities
            for ``"nll"``, probabilities or logits for ``"error"``, numbers for
            ``"squared_error"``. They may not hold NaN or infinite values.
        targets: The true classes, or the true numbers.
        loss: ``"nll"``, in nats, where a probability of zero counts as 1e-38; ``"error"``, the
            share of wrong classes; ``"squared_error"``; or a function ``loss(output, targets)``
            of one combined output that returns one number, the lower the better.
        steps: How many times a member is added.
        start: So many steps go to the members that are best by themselves, in that order, before
            the choice is free. Selection with few rows overfits less from a start of 5 or so.
        dim: The class axis of the outputs, for ``"nll"`` and ``"error"``.

    Returns:
        The weights, multiples of one over the number of steps that count; float32 at least.

    Shape:
        - outputs: (N, B, C) for classes, (N, *) for numbers
        - targets: (B) for classes, (*) for numbers
        - returns: (N)

    Raises:
        ValueError: If shapes don't fit, outputs aren't finite or no probabilities, classes are out
            of range, steps or start are no numbers of steps, or the loss is NaN for all.
        TypeError: If outputs or targets aren't tensors of the right kind.

    Example:
        >>> right, wrong = [[0.9, 0.1], [0.1, 0.9]], [[0.1, 0.9], [0.9, 0.1]]
        >>> greedy(torch.tensor([wrong, right, wrong]), torch.tensor([0, 1]))
        tensor([0., 1., 0.])

    Reference: Caruana et al., Ensemble Selection from Libraries of Models, 2004,
        https://www.cs.cornell.edu/~alexn/papers/shotgun.icml04.revised.rev2.pdf
    """
    call = "selection.greedy"
    outputs = held_out.check_outputs(call, outputs)
    n = len(outputs)
    _check_steps(call, steps, start, n)
    rows, losses_of = _candidates(call, loss, outputs, targets, dim)
    total = torch.zeros_like(rows[0])
    chosen, reached = [], []
    ranking: Tensor | None = None
    for k in range(steps):
        losses = losses_of((total + rows) / (k + 1))
        losses = losses.masked_fill(losses.isnan(), torch.inf)  # argmin takes NaN for the least
        if ranking is None:
            ranking = losses.argsort(stable=True)
        # A tensor as index: nothing is read back from the device within the loop.
        choice = ranking[k : k + 1] if k < start else losses.argmin().reshape(1)
        total = total + rows.index_select(0, choice).squeeze(0)
        chosen.append(choice)
        reached.append(losses.index_select(0, choice))
    path = torch.cat(reached)
    last = path.argmin()
    if not bool(path[last].isfinite()):
        raise ValueError(
            f"{call}: the loss of every combination is NaN or infinite; look at"
            f" loss(outputs.mean(0), targets)"
        )
    count = (torch.arange(steps, device=path.device) <= last).to(_wide(outputs))
    weights = torch.zeros(n, dtype=count.dtype, device=path.device)
    weights = weights.scatter_add(0, torch.cat(chosen), count) / count.sum()
    return weights.to(outputs.device)


def convex_weights(
    outputs: Tensor,
    targets: Tensor,
    *,
    loss: Literal["nll", "squared_error"] = "nll",
    tolerance: float = 1e-9,
    dim: int = -1,
) -> Tensor:
    """Find the weights of the best average: stacking, with ``w >= 0`` and ``sum w = 1``.

    ``"nll"`` minimises ``-mean_b log sum_i w[i] p[i, b, y_b]``, in nats, ``"squared_error"``
    minimises ``mean (sum_i w[i] o[i] - y)^2``. Both are convex: the result is the minimum, on these
    data. Of weights that are equally good it is the most even, whatever the order of the members.
    For a mixture of densities, see `mixture_weights`.

    Args:
        outputs: Outputs of all members on held-out data: probabilities for ``"nll"``, numbers for
            ``"squared_error"``. They may not hold NaN or infinite values. Rows to whose class all
            members give probability zero say nothing about the weights, and are left out.
        targets: The true classes, or the true numbers.
        loss: Which of the two.
        tolerance: How far the loss may be from its minimum: nats, or a share of the members' mean
            squared error.
        dim: The class axis of the probabilities.

    Returns:
        The weights, float32 at least.

    Shape:
        - outputs: (N, B, C) for classes, (N, *) for numbers
        - targets: (B) for classes, (*) for numbers
        - returns: (N)

    Raises:
        ValueError: If shapes don't fit, outputs aren't finite or no probabilities, classes are out
            of range, or the tolerance is too small to be reached.
        TypeError: If outputs or targets aren't tensors of the right kind.

    Example:
        >>> y = torch.linspace(0, 1, 50)
        >>> convex_weights(torch.stack([y + 1, y - 2]), y, loss="squared_error")
        tensor([0.6667, 0.3333])

    Reference: Wolpert, Stacked generalization, 1992, https://doi.org/10.1016/S0893-6080(05)80023-1;
        Breiman, Stacked regressions, 1996, https://doi.org/10.1007/BF00117832
    """
    call = "selection.convex_weights"
    outputs = held_out.check_outputs(call, outputs)
    _check_loss(call, loss, ("nll", "squared_error"))
    if loss == "squared_error":
        numbers, true = held_out.number_rows(call, _exact(outputs), targets)
        # The weights sum to one, so the error is the average of the errors; and those are small.
        return _solve(call, outputs, _squared(numbers - true), tolerance)
    rows, classes = held_out.class_rows(call, outputs, targets, dim)
    held_out.check_probabilities(call, rows)
    return _mixture(call, _exact(_of_class(rows, classes)).log(), outputs, tolerance)


def mixture_weights(log_densities: Tensor, *, tolerance: float = 1e-9) -> Tensor:
    """Find the weights of the best mixture: ``argmin_w -mean_b log sum_i w[i] exp(l[i, b])``.

    For members that predict a distribution each: ``l[i, b]`` is the logarithm of the density, or
    probability, that member i gives to what was observed in row b. As `convex_weights` for
    anything that has a likelihood.

    Args:
        log_densities: One number for each member and row; -inf for the impossible.
        tolerance: How far the mean negative log-likelihood may be from its minimum, in nats.

    Returns:
        The weights, float32 at least.

    Shape:
        - log_densities: (N, *)
        - returns: (N)

    Raises:
        ValueError: If there is NaN or +inf, or every row is impossible for all members, or the
            tolerance is too small to be reached.
        TypeError: If this is no tensor of floating dtype.

    Example:
        >>> mean, std = torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [1.0]])
        >>> y = torch.tensor([-1.0, 0.0, 1.0, 5.0])  # three of the first, one of the second
        >>> mixture_weights(torch.distributions.Normal(mean, std).log_prob(y))
        tensor([0.7500, 0.2500])

    Reference: Yao et al., Using Stacking to Average Bayesian Predictive Distributions, 2018,
        https://arxiv.org/abs/1704.02030
    """
    call = "selection.mixture_weights"
    values = held_out.check_outputs(call, log_densities, minus_infinity=True)
    return _mixture(call, _exact(values.flatten(1)), values, tolerance)


def _mixture(call: str, log_densities: Tensor, outputs: Tensor, tolerance: float) -> Tensor:
    highest = log_densities.amax(0)
    possible = highest.isfinite()
    if not bool(possible.any()):
        raise ValueError(
            f"{call}: every member gives probability zero to all {len(highest)} targets, so no"
            f" weights are better than others; look for targets of other rows than the outputs"
        )
    # A factor in each row moves the loss and not its minimum: the likeliest member has 1 there.
    densities = (log_densities - highest)[:, possible].exp()  # (N, M)
    return _solve(call, outputs, _negative_log(densities), tolerance)


def _solve(
    call: str, outputs: Tensor, derivatives: simplex.Derivatives, tolerance: float
) -> Tensor:
    if not tolerance > 0:
        raise ValueError(f"{call}: tolerance is a number above zero, got {tolerance!r}")
    n = len(outputs)
    even = _exact(torch.full((n,), 1 / n, device=outputs.device))
    return simplex.minimise(derivatives, even, tolerance=tolerance, call=call).to(
        outputs.device, _wide(outputs)
    )


def _negative_log(densities: Tensor) -> simplex.Derivatives:
    """Of ``-mean_b log (w @ p)[b]``."""
    rows = densities.shape[1]

    def derivatives(w: Tensor) -> tuple[Tensor, Tensor]:
        shares = densities / (w @ densities)
        return -shares.mean(1), shares @ shares.T / rows

    return derivatives


def _squared(errors: Tensor) -> simplex.Derivatives:
    """Of ``mean_b (w @ e)[b]^2``, in units of the members' own mean."""
    products = errors @ errors.T / errors.shape[1]
    scale = products.diagonal().mean()
    products = products / torch.where(scale > 0, scale, 1.0)
    return lambda w: (2 * products @ w, 2 * products)


def _candidates(
    call: str, loss: Loss, outputs: Tensor, targets: Tensor, dim: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What is averaged, (N, *), and the losses (N) of N such averages."""
    wide = outputs.to(_wide(outputs))
    if callable(loss):
        return wide, lambda averages: member_losses(loss, averages, targets)
    _check_loss(call, loss, get_args(LossName))
    if loss == "squared_error":
        numbers, true = held_out.number_rows(call, _exact(outputs), targets)
        return numbers, lambda averages: (averages - true).square().mean(1)
    rows, classes = held_out.class_rows(call, wide, targets, dim)
    if loss == "error":
        return rows, lambda averages: (averages.argmax(-1) != classes).to(rows.dtype).mean(1)
    held_out.check_probabilities(call, rows)
    # The average's probability of the true class is the average of those: the others don't count.
    likely = _exact(_of_class(rows, classes))
    return likely, lambda averages: -averages.clamp_min(_LEAST).log().mean(1)


def _of_class(rows: Tensor, classes: Tensor) -> Tensor:
    """(N, M, C) and (M) -> (N, M), what stands at each row's class."""
    return rows.gather(-1, classes.expand(len(rows), -1).unsqueeze(-1)).squeeze(-1)


def _wide(outputs: Tensor) -> torch.dtype:
    return torch.promote_types(outputs.dtype, torch.float32)


def _exact(values: Tensor) -> Tensor:
    """In float64, and on the CPU if the device has none."""
    return values.to("cpu" if values.device.type == "mps" else values.device, torch.float64)


def _check_loss(call: str, loss: object, known: tuple[str, ...]) -> None:
    if loss not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"{call}: loss is one of {names}; got {loss!r}")


def _check_steps(call: str, steps: object, start: object, n: int) -> None:
    problems = []
    if not isinstance(steps, SupportsIndex) or operator.index(steps) < 1:
        problems.append(f"steps is a number of steps, at least 1; got {steps!r}")
    if not isinstance(start, SupportsIndex) or not 0 <= operator.index(start) <= n:
        problems.append(f"start is a number of members, from 0 to {n}; got {start!r}")
    if problems:
        raise ValueError(f"{call}: " + "; ".join(problems))
