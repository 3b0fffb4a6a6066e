"""The most frequent layer without detours: ``nn.Linear`` in a template calls its rule directly.

The way through ``F.linear`` and torch's dispatcher to the same rule costs about as much as a small
matrix product.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from unisono.engine.axis import parameters_of, run_rule
from unisono.engine.rules.linear import linear


class LinearForward:
    """``forward`` of one ``nn.Linear`` of a template."""

    __slots__ = ("_parameters",)

    def __init__(self, module: nn.Linear) -> None:
        self._parameters = parameters_of(module)

    def __call__(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias``."""
        own = self._parameters
        return run_rule(linear, F.linear, input, own["weight"], own["bias"])


def shorten(module: nn.Module) -> None:
    """Let the linear layers of a template call their rule directly.

    Only those of torch's own class, with nothing exchanged: not a subclass, nor one whose weight
    is computed by a hook or a parametrization.
    """
    for each in module.modules():
        if type(each) is nn.Linear and "forward" not in vars(each):
            if {"weight", "bias"} <= parameters_of(each).keys():
                each.forward = LinearForward(each)  # type: ignore[method-assign]
