"""The most frequent layers without detours: in a template they call their rule directly.

The way through ``F.linear`` and torch's dispatcher to the rule costs about as much as a small
matrix product. Between the layers of an ``nn.Sequential`` nobody sees the intermediate results, so
there an activation can also write its result to where it was read from: half the fresh memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unisono.engine.axis import (
    Operand,
    has_global_hooks,
    hooks_of,
    is_end_of_recomputation,
    parameters_of,
    unwrap,
)
from unisono.engine.kernels import run_chain, run_rule
from unisono.engine.rules.linear import linear

# Their derivatives are functions of the result, so autograd, too, can do without the input.
_IN_PLACE: Final[dict[type[nn.Module], Callable[[Tensor], Tensor]]] = {
    nn.ReLU: torch.relu_,
    nn.Tanh: torch.tanh_,
    nn.Sigmoid: torch.sigmoid_,
}


def shorten(module: nn.Module) -> None:
    """Let the linear layers of a template, and chains of them, call their rule directly.

    Only layers of torch's own classes, with nothing exchanged: not a subclass, nor one whose
    weight is computed by a hook or a parametrization.
    """
    for each in module.modules():
        if "forward" in vars(each):
            continue
        if type(each) is nn.Linear and _is_plain(each):
            each.forward = LinearForward(each)  # type: ignore[method-assign]
        elif type(each) is nn.Sequential and len(each) > 1:
            each.forward = SequentialForward(list(each))  # type: ignore[method-assign]


class LinearForward:
    """``forward`` of one ``nn.Linear`` of a template."""

    __slots__ = ("_parameters",)

    def __init__(self, module: nn.Linear) -> None:
        self._parameters = parameters_of(module)

    def __call__(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias``."""
        own = self._parameters
        return run_rule(linear, F.linear, input, own["weight"], own["bias"])


class SequentialForward:
    """``forward`` of one ``nn.Sequential`` of a template: runs of simple layers in one go."""

    __slots__ = ("_modules", "_parts")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._parts: list[nn.Module | _Chain] = []
        run: list[nn.Module] = []
        for module in [*modules, None]:
            if module is not None and _is_simple(module):
                run.append(module)
                continue
            # An activation that comes first may not write to what the layer before has returned.
            self._parts += [_Chain(run)] if any(type(m) is nn.Linear for m in run) else run
            self._parts += [] if module is None else [module]
            run = []

    def __call__(self, input: Tensor) -> Tensor:
        """The layers one after another."""
        for part in self._modules if has_global_hooks() else self._parts:
            input = part(input)
        return input


class _Chain:
    """Linear layers and activations between which nobody looks."""

    __slots__ = ("_modules", "_steps")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = list(modules)
        self._steps = [
            (parameters_of(m) if type(m) is nn.Linear else None, _IN_PLACE.get(type(m)))
            for m in modules
        ]

    def __call__(self, x: Tensor) -> Tensor:
        if type(x) is Tensor:
            try:
                result = run_chain(self._run, x)
            except Exception as error:
                if is_end_of_recomputation(error):
                    raise
                result = None  # the layers one by one will say which of them is wrong
            if result is not None:
                return result
        for module in self._modules:
            x = module(x)
        return x

    def _run(self, n: int, x: Operand, level: int) -> Operand | None:
        is_fresh = False
        for parameters, activation in self._steps:
            if parameters is None:
                assert activation is not None
                value = activation(x[0] if is_fresh else x[0].clone())
                x, is_fresh = (value, x[1]), True
                continue
            weight, bias = parameters["weight"], parameters["bias"]
            assert weight is not None
            result = linear(
                n, x, unwrap(weight, level), None if bias is None else unwrap(bias, level)
            )
            if result is None:
                return None
            x, is_fresh = result, True
        return x


def _is_simple(module: nn.Module) -> bool:
    if any(hooks_of(module)) or (type(module) is not nn.Linear and "forward" in vars(module)):
        return False
    return (type(module) is nn.Linear and _is_plain(module)) or type(module) in _IN_PLACE


def _is_plain(module: nn.Linear) -> bool:
    return {"weight", "bias"} <= parameters_of(module).keys()
