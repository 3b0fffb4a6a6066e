"""The most frequent layers without detours: in a template they call their rule directly.

The way through ``F.linear`` and torch's dispatcher to the rule costs about as much as a small
matrix product. Between the layers of an ``nn.Sequential`` nobody sees the intermediate results, so
there an activation also writes its result to where it was read from: half the fresh memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

Activation = Callable[[Tensor], Tensor]

# In place and not. Their derivatives are functions of the result, so autograd, too, can do without
# the input.
_ACTIVATIONS: Final[Mapping[type[nn.Module], tuple[Activation, Activation]]] = {
    nn.ReLU: (torch.relu_, torch.relu),
    nn.Tanh: (torch.tanh_, torch.tanh),
    nn.Sigmoid: (torch.sigmoid_, torch.sigmoid),
}


def shorten(module: nn.Module) -> None:
    """Let the linear layers of a template, and chains of layers, take the short way.

    Only layers of torch's own classes, with nothing exchanged: not a subclass, nor one whose
    weight is computed by a hook or a parametrization.
    """
    for each in module.modules():  # a Sequential before its layers
        if type(each) is nn.Sequential and "forward" not in vars(each):
            each.forward = SequentialForward(list(each))  # type: ignore[method-assign]
        elif type(each) is nn.Linear and "forward" not in vars(each):
            if {"weight", "bias"} <= parameters_of(each).keys():
                each.forward = LinearForward(each)  # type: ignore[method-assign]


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
    """``forward`` of one ``nn.Sequential`` of a template."""

    __slots__ = ("_modules", "_parts")

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._parts: list[nn.Module | _Chain] = []
        chain: list[nn.Module] = []
        for module in modules:
            if _is_plain(module) or (chain and type(module) in _ACTIVATIONS and _is_unseen(module)):
                chain.append(module)
                continue
            self._parts += [_Chain(chain), module] if chain else [module]
            chain = []
        self._parts += [_Chain(chain)] if chain else []

    def __call__(self, input: Tensor) -> Tensor:
        """The layers one after another."""
        for part in self._modules if has_global_hooks() else self._parts:
            input = part(input)
        return input


class _Chain:
    """A linear layer, and linear layers and activations behind it, between which nobody looks."""

    __slots__ = ("_steps",)

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._steps = [(module, _ACTIVATIONS.get(type(module))) for module in modules]

    def __call__(self, x: Tensor) -> Tensor:
        """The layers one after another."""
        if type(x) is Tensor:
            try:
                result = run_chain(self._run, x)
            except Exception as error:
                if is_end_of_recomputation(error):
                    raise
                result = None  # the layers one by one will say which of them is wrong
            if result is not None:
                return result
        for module, _ in self._steps:
            x = module(x)
        return x

    def _run(self, n: int, x: Operand, level: int) -> Operand | None:
        grad = torch.is_grad_enabled()
        is_product = False
        for module, activation in self._steps:
            if activation is not None:
                # Backward needs the result of an activation, so the next one must not write to
                # it. And a product with more axes is a view, of which autograd copies the whole.
                in_place, out_of_place = activation
                can_write = not grad or (is_product and x[0].dim() == 3)
                x, is_product = ((in_place if can_write else out_of_place)(x[0]), x[1]), False
                continue
            own = parameters_of(module)
            weight, bias = own["weight"], own["bias"]
            assert weight is not None
            result = linear(
                n, x, unwrap(weight, level), None if bias is None else unwrap(bias, level)
            )
            if result is None:
                return None
            x, is_product = result, True
        return x


def _is_plain(module: nn.Module) -> bool:
    names = parameters_of(module)
    return type(module) is nn.Linear and {"weight", "bias"} <= names.keys() and _is_unseen(module)


def _is_unseen(module: nn.Module) -> bool:
    """Whether nothing but the layer's own forward learns of its result."""
    return not any(hooks_of(module)) and "forward" not in vars(module)
