"""`F.gaussian_nll_loss` for all members at once.

It asks whether any variance is negative, and so can't run inside the member axis as it stands. It
is a Python function of torch, not an op, so no rule of the engine sees it; a mode does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from unisono.engine.axis import attach, below, detach, levels
from unisono.engine.rules.layout import for_each_member


class GaussianNLLAtOnce(TorchFunctionMode):
    """Let `F.gaussian_nll_loss` inside the member axis ask once, for all members together."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the function; `F.gaussian_nll_loss` on the stacked tensors."""
        kwargs = kwargs or {}
        if func is F.gaussian_nll_loss:
            result = _at_once(*args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


def _at_once(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor | None:
    """None where the shapes would be broadcast with each other, along wrong axes."""
    level, n, _ = levels.entered[-1]
    if target.shape != input.shape or reduction not in ("none", "mean", "sum"):
        return None
    x, y = (for_each_member(detach(each, level), n) for each in (input, target))
    v = for_each_member(detach(var, level), n) if isinstance(var, Tensor) else var
    with below():
        losses = F.gaussian_nll_loss(x, y, v, full=full, eps=eps, reduction="none")
        if reduction != "none":
            losses = losses.reshape(n, -1)
            losses = losses.mean(1) if reduction == "mean" else losses.sum(1)
    return attach(losses, level)
