"""Torch's own layers as steps on plain tensors, without the way through module and dispatcher.

A step runs the rule of its layer at once. Between two steps nobody sees the result, so what
follows may write to where it reads from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import nn

from unisono.engine.axis import hooks_of
from unisono.engine.steps.elementwise import ELEMENTWISE
from unisono.engine.steps.layers import LAYERS
from unisono.engine.steps.pairs import joined as joined
from unisono.engine.steps.pairs import pays_to_fold as pays_to_fold
from unisono.engine.steps.pooling import POOLS
from unisono.engine.steps.pooling import WINDOW_POOLS as WINDOW_POOLS
from unisono.engine.steps.step import Look as Look
from unisono.engine.steps.step import Step as Step

STEPS: Final[Mapping[type[nn.Module], Callable[[Any], Step | None]]] = {
    **LAYERS,
    **POOLS,
    **ELEMENTWISE,
}
"""For each class how the step of a layer is made."""


def step_of(module: nn.Module) -> Step | None:
    """The step of a layer; None if it isn't one of torch's own classes, or somebody looks at it."""
    make = STEPS.get(type(module))
    if make is None or "forward" in vars(module) or any(hooks_of(module)):
        return None
    return make(module)
