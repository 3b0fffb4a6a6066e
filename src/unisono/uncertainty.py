"""How much the members don't know, and how much nobody could: total = aleatoric + epistemic.

Pure functions of the tensors that an ensemble returns. *Aleatoric* is the uncertainty that each
member states by itself; *epistemic* is what comes on top because the members disagree, and is never
negative. None of the functions waits for a device; all of them can be differentiated and compiled.
Half precision is computed in float32 and rounded at the end. NaN of one member shows as NaN.

References: Lakshminarayanan, Pritzel and Blundell, "Simple and Scalable Predictive Uncertainty
Estimation using Deep Ensembles", 2017, https://arxiv.org/abs/1612.01474; Depeweg et al.,
"Decomposition of Uncertainty in Bayesian Deep Learning for Efficient and Risk-sensitive Learning",
2018, https://arxiv.org/abs/1710.07283
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from unisono import collectives, member_axis, member_reduction
from unisono.disagreement import disagreement_matrix as disagreement_matrix
from unisono.disagreement import pairwise_disagreement as pairwise_disagreement
from unisono.disagreement import variation_ratio as variation_ratio

Given = Literal["logits", "probabilities"]


class Uncertainty(NamedTuple):
    """A prediction, and its uncertainty in two parts: ``total == aleatoric + epistemic``.

    Args:
        prediction: Of all members together.
        total: Of the prediction.
        aleatoric: What members state on average, each by itself.
        epistemic: What comes from their disagreement; zero where they agree.

    Example:
        >>> agree = classification(torch.zeros(2, 4))
        >>> agree.total, agree.epistemic
        (tensor(1.3863), tensor(0.))
    """

    prediction: Any
    total: Any
    aleatoric: Any
    epistemic: Any


def classification(
    outputs: Tensor,
    *,
    dim: int = -1,
    given: Given = "logits",
    weights: Tensor | Sequence[float] | None = None,
    mesh: DeviceMesh | None = None,
) -> Uncertainty:
    """Split the entropy of the mean: ``H[mean p_i] == mean H[p_i] + mean KL(p_i, mean p_i)``.

    ``prediction = sum_i w_i p_i``; `total` is its entropy, `aleatoric` the members' mean entropy,
    and `epistemic` the mutual information of class and member. The latter is computed as the mean
    Kullback-Leibler divergence of a member from the prediction, not as the difference of two
    entropies: so it is at least zero, and right where it is small.

    Args:
        outputs: Logits or probabilities of all members, of floating dtype. Log-probabilities are
            logits. -inf among the logits is a class of probability zero.
        dim: The class axis, any but the member axis 0.
        given: Which of the two they are: ``"logits"`` or ``"probabilities"``.
        weights: One number per member, as for `combine.weighted`; equal ones by default.
        mesh: The ranks that the members are spread over; then all that is given is of this rank's
            members, and the result is that of all.

    Returns:
        Mean probabilities, and three entropies in nats, from 0 to log(C); the epistemic one to
        log(N) at most. All of the outputs' dtype.

    Shape:
        - outputs: (N, *, C)
        - prediction: (*, C)
        - total, aleatoric, epistemic: (*)

    Raises:
        ValueError: If there is no member axis, no member on it, no class axis `dim`, or if
            probabilities on the CPU aren't such.
        TypeError: If the outputs are no tensor, integers, or complex.

    Example:
        >>> sure_but_divided = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> classification(sure_but_divided, given="probabilities")
        Uncertainty(prediction=tensor([0.5000, 0.5000]), total=tensor(0.6931),
            aleatoric=tensor(0.), epistemic=tensor(0.6931))

    References: Houlsby et al., "Bayesian Active Learning for Classification and Preference
    Learning", 2011, https://arxiv.org/abs/1112.5745, for the mutual information; Depeweg et al.
    2018, above.
    """
    call = "uncertainty.classification"
    member_axis.check_members(call, outputs)
    _check_dtype(call, outputs)
    if given not in ("logits", "probabilities"):
        raise ValueError(f'{call}: given is "logits" or "probabilities"; got {given!r}')
    dim = member_axis.class_axis(call, outputs, dim)
    group = collectives.member_group(call, mesh)
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    w = None if weights is None else member_axis.shares(call, weights, outputs, group)
    axis = dim
    if outputs.device.type == "cpu":
        # What runs along a last axis of few classes takes twice as long there as along rows.
        axis, wide = 1, wide.movedim(dim, 1).contiguous()  # (N, C, *)
    if given == "logits":
        log_p = member_axis.finite(wide.log_softmax(axis))
        p = log_p.exp()
        log_prediction = member_axis.log_mean(log_p, w, group)  # without N
        prediction = log_prediction.exp()
    else:
        collectives.raise_together(
            _wrong_probabilities(call, outputs, dim), _reading(outputs, group), "cpu"
        )
        p = wide
        prediction = member_reduction.mean(p, w, group)
        log_p, log_prediction = _log(p), _log(prediction)
    w = None if w is None else w.squeeze(axis)
    aleatoric = member_reduction.mean(-(p * log_p).sum(axis), w, group).clamp(min=0)
    together = (collectives.each_uses(each, group) for each in (prediction, log_prediction))
    divergence = _divergence_terms(p, log_p, *together)
    epistemic = member_reduction.mean(divergence.sum(axis), w, group).clamp(min=0)
    prediction = prediction.movedim(axis - 1, dim - 1).contiguous()
    found = (prediction, aleatoric + epistemic, aleatoric, epistemic)
    return Uncertainty(*(each.to(outputs.dtype) for each in found))


def regression(
    mean: Tensor,
    variance: Tensor | None = None,
    *,
    weights: Tensor | Sequence[float] | None = None,
    mesh: DeviceMesh | None = None,
) -> Uncertainty:
    """Split the variance of a mixture: ``Var[y] == mean variance_i + variance of mean_i``.

    Each member is a distribution with a mean and a variance, as a Gaussian; together they are the
    mixture of them, whose mean is the `prediction` and whose variance is `total`. `aleatoric` is
    the mean of the members' variances, `epistemic` the variance of their means (divided by N, not
    by N - 1: that of the mixture). Members that predict a point only state no variance: their
    `aleatoric` is zero and `total` is `epistemic`.

    Args:
        mean: Predictions of all members, of floating dtype.
        variance: Variances of the same shape, none below zero: of log-variances, ``.exp()``. None
            for members that predict points.
        weights: One number per member, as for `combine.weighted`; equal ones by default.
        mesh: The ranks that the members are spread over; then all that is given is of this rank's
            members, and the result is that of all.

    Returns:
        The mean, and three variances in the squared unit of the mean, of its dtype.

    Shape:
        - mean, variance: (N, *)
        - each of the results: (*)

    Raises:
        ValueError: If there is no member axis, no member on it, if the shapes differ, or a
            variance on the CPU is below zero.
        TypeError: If one is no tensor, integers, or complex.

    Example:
        >>> regression(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.7]))
        Uncertainty(prediction=tensor(2.), total=tensor(1.6000),
            aleatoric=tensor(0.6000), epistemic=tensor(1.))

    Reference: Lakshminarayanan et al. 2017, above, section 2.4.
    """
    call = "uncertainty.regression"
    member_axis.check_members(call, mean)
    _check_dtype(call, mean)
    group = collectives.member_group(call, mesh)
    collectives.raise_together(
        _wrong_variance(call, mean, variance), _reading(variance, group), "cpu"
    )
    wide = torch.promote_types(mean.dtype, torch.float32)
    if variance is not None:
        wide = torch.promote_types(wide, variance.dtype)
    w = None if weights is None else member_axis.shares(call, weights, mean, group)
    # From member 0 on: where all agree the difference is exactly zero, however large the numbers.
    first = _origin(mean, group).to(wide)
    offset = mean.to(wide) - first
    average = member_reduction.mean(offset, w, group)
    prediction = first + average
    epistemic = member_reduction.mean(
        (offset - collectives.each_uses(average, group)).square(), w, group
    )
    aleatoric = torch.zeros_like(epistemic)
    if variance is not None:
        aleatoric = member_reduction.mean(variance.to(wide), w, group)
    found = (prediction, aleatoric + epistemic, aleatoric, epistemic)
    return Uncertainty(*(each.to(mean.dtype) for each in found))


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=torch.finfo(p.dtype).tiny).log()


def _divergence_terms(p: Tensor, log_p: Tensor, mean: Tensor, log_of_mean: Tensor) -> Tensor:
    """Terms of KL(p, mean): ``p log(p / mean) - p + mean``, each at least zero.

    The last two add up to nothing over the members, but term by term they take away what is of
    first order in the difference: rounding of 1e-7 leaves 1e-14 and not 1e-7.
    """
    d = log_p - log_of_mean
    is_near = d.abs() < 1
    near = d.where(is_near, torch.zeros_like(d))
    return torch.where(is_near, p * (near + torch.expm1(-near)), p * d - p + mean)


def _origin(mean: Tensor, group: ProcessGroup | None) -> Tensor:
    """Member 0 of all; nothing depends on it but how differences are rounded."""
    first = mean.detach().select(0, 0)
    return first if group is None else collectives.broadcast_first(first, group)


def _reading(values: Tensor | None, group: ProcessGroup | None) -> ProcessGroup | None:
    """The ranks that may find different things when values are read; only those on the CPU are."""
    return group if isinstance(values, Tensor) and values.device.type == "cpu" else None


def _check_dtype(call: str, outputs: Tensor) -> None:
    if not (outputs.is_floating_point() or outputs.is_complex()):
        raise TypeError(
            f"{call}: expected outputs of floating dtype, got {outputs.dtype}; labels have an "
            f"uncertainty.variation_ratio"
        )


def _wrong_probabilities(call: str, outputs: Tensor, dim: int) -> Exception | None:
    """The error for logits that pass for probabilities, if that takes no wait for a device."""
    slack = max(1e-3, 16 * torch.finfo(outputs.dtype).eps)
    p = outputs.detach()
    sums = p.sum(dim, dtype=torch.promote_types(p.dtype, torch.float32))
    # Comparisons with NaN are false: it passes, and shows in the result.
    facts = torch.stack([(p < 0).sum(), ((sums - 1).abs() > slack).sum()])
    counts = member_axis.values_on_cpu(facts)
    if counts and any(counts):
        return ValueError(
            f"{call}: probabilities are at least 0 and sum to 1 over the classes on axis {dim}, "
            f"but {counts[0]} of {p.numel()} are below 0, and {counts[1]} of {sums.numel()} sums "
            f'differ from 1; pass given="logits" for logits, or another dim'
        )
    return None


def _wrong_variance(call: str, mean: Tensor, variance: Tensor | None) -> Exception | None:
    if mean.is_complex():
        return TypeError(f"{call}: predictions are real numbers, got {mean.dtype}")
    if variance is None:
        return None
    if not isinstance(variance, Tensor) or not variance.is_floating_point():
        kind = variance.dtype if isinstance(variance, Tensor) else type(variance).__name__
        return TypeError(f"{call}: variance is a tensor of floating dtype, got {kind}")
    if variance.shape != mean.shape:
        return ValueError(
            f"{call}: each prediction has one variance, but mean has shape {tuple(mean.shape)} and "
            f"variance {tuple(variance.shape)}"
        )
    negative = member_axis.values_on_cpu((variance.detach() < 0).sum().reshape(1))
    if negative and any(negative):
        return ValueError(
            f"{call}: variances are at least 0, but {negative[0]} of {variance.numel()} are below; "
            f"for members that return log-variances: regression(mean, log_variance.exp())"
        )
    return None
