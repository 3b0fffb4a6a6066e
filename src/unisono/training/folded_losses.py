"""The losses of `torch.nn` that everybody uses, over the examples of all members in a few ops.

`engine` gives the same numbers for any function. For a loss of three ops the way through it costs
as much as the ops themselves, so the exact functions and modules named here take the short one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from torch import Tensor, nn
from torch.nn import functional as F

from unisono.engine.axis import Operand, has_global_hooks, hooks_of
from unisono.engine.inputs import PerMember
from unisono.engine.rules.loss import cross_entropy, nll

LossFn = Callable[[Any, Any], Any]

_REDUCTIONS: Final = {"mean": 1, "sum": 2}  # at::Reduction

_ELEMENTWISE: Final[Mapping[LossFn, frozenset[str]]] = {
    F.mse_loss: frozenset({"reduction"}),
    F.l1_loss: frozenset({"reduction"}),
    F.huber_loss: frozenset({"reduction", "delta"}),
    F.smooth_l1_loss: frozenset({"reduction", "beta"}),
    F.binary_cross_entropy: frozenset({"reduction", "weight"}),
    F.binary_cross_entropy_with_logits: frozenset({"reduction", "weight", "pos_weight"}),
}
"""Losses of single elements, and their options that change the elements alone."""

_OF_CLASSES: Final[Mapping[LossFn, frozenset[str]]] = {
    F.cross_entropy: frozenset({"reduction", "weight", "ignore_index", "label_smoothing"}),
    F.nll_loss: frozenset({"reduction", "weight", "ignore_index"}),
}
"""Losses of a choice among classes, and their options."""

_MODULES: Final[Mapping[type[nn.Module], LossFn]] = {
    nn.MSELoss: F.mse_loss,
    nn.L1Loss: F.l1_loss,
    nn.HuberLoss: F.huber_loss,
    nn.SmoothL1Loss: F.smooth_l1_loss,
    nn.BCELoss: F.binary_cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.NLLLoss: F.nll_loss,
}
"""Modules that hold the options of a function in attributes of the same names."""


def folded_losses(loss_fn: LossFn, outputs: Any, targets: Any, n: int) -> Tensor | None:
    """Take ``loss_fn(outputs[i], targets)`` for all members i, if it is known here.

    Args:
        loss_fn: A function of `torch.nn.functional`, one of the modules that wrap them, or a
            `functools.partial` of the function that gives it options.
        outputs: Outputs of all members.
        targets: Targets, shared or marked with `per_member`.
        n: The number of members.

    Returns:
        The losses; None if this is another function, or the shapes or options are unusual.

    Shape:
        - outputs: (N, B, *)
        - targets: shared or (N, *), a member's part of which the loss takes without broadcasting
        - returns: (N)
    """
    marked = isinstance(targets, PerMember)
    y = targets.tree if isinstance(targets, PerMember) else targets
    if not (isinstance(outputs, Tensor) and isinstance(y, Tensor)):
        return None
    fn, options = _function_and_options(loss_fn)
    reduction = options.get("reduction", "mean")
    if reduction not in _REDUCTIONS:
        return None
    if fn in _ELEMENTWISE and options.keys() <= _ELEMENTWISE[fn]:
        shape = y.shape[1:] if marked else y.shape
        if shape != outputs.shape[1:] or _is_wide(options, outputs.dim() - 1):
            return None
        losses: Tensor = fn(outputs, y if marked else y.expand_as(outputs), **_unreduced(options))
        own = tuple(range(1, losses.dim()))
        if not own:
            return losses
        return losses.mean(own) if reduction == "mean" else losses.sum(own)
    if fn in _OF_CLASSES and options.keys() <= _OF_CLASSES[fn]:
        return _loss_of_classes(fn, n, (outputs, 0), (y, 0 if marked else None), options)
    return None


def _function_and_options(loss_fn: Any) -> tuple[Any, Mapping[str, Any]]:
    if isinstance(loss_fn, partial):
        return (None, {}) if loss_fn.args else (loss_fn.func, loss_fn.keywords)
    if not isinstance(loss_fn, nn.Module):
        return loss_fn, {}
    fn = _MODULES.get(type(loss_fn))  # the exact class: a subclass may compute something else
    if fn is None or "forward" in vars(loss_fn) or any(hooks_of(loss_fn)) or has_global_hooks():
        return None, {}
    names = _ELEMENTWISE[fn] if fn in _ELEMENTWISE else _OF_CLASSES[fn]
    return fn, {name: getattr(loss_fn, name) for name in names}


def _unreduced(options: Mapping[str, Any]) -> dict[str, Any]:
    return {**options, "reduction": "none"}


def _is_wide(options: Mapping[str, Any], rank: int) -> bool:
    """Whether a weight has more axes than the outputs of a member, so that it would meet N."""
    weights = [options.get("weight"), options.get("pos_weight")]
    return any(isinstance(weight, Tensor) and weight.dim() > rank for weight in weights)


def _loss_of_classes(
    fn: LossFn, n: int, scores: Operand, target: Operand, options: Mapping[str, Any]
) -> Tensor | None:
    weight = options.get("weight")
    given = (
        None if weight is None else (weight, None),
        _REDUCTIONS[options.get("reduction", "mean")],
        options.get("ignore_index", -100),
    )
    if fn is F.nll_loss:
        result = nll(n, scores, target, *given)
    else:
        result = cross_entropy(n, scores, target, *given, options.get("label_smoothing", 0.0))
    return None if result is None else result[0]
