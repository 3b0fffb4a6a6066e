"""The most frequent layers without detours: in a template they call their rules directly.

The way through ``F.linear`` and torch's dispatcher to the rule costs about as much as a small
matrix product. Between the layers of an ``nn.Sequential`` nobody sees the intermediate results, so
there an activation also writes its result to where it was read from: half the fresh memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unisono.engine.axis import (
    Operand,
    has_global_hooks,
    hooks_of,
    is_end_of_recomputation,
    parameters_of,
)
from unisono.engine.kernels import is_outside, run_chain, run_rule
from unisono.engine.leaf_attention import AttentionForward, is_plain_attention
from unisono.engine.rules.linear import linear
from unisono.engine.steps import WINDOW_POOLS, Look, Step, joined, step_of


def shorten(module: nn.Module) -> None:
    """Let the layers of a template, and chains of layers, take the short way.

    Only layers of torch's own classes, with nothing exchanged: not a subclass, nor one whose
    weight is computed by a hook or a parametrization.
    """
    for each in list(module.modules()):  # a Sequential before its layers
        if "forward" in vars(each):
            continue
        if isinstance(each, nn.Sequential):
            if _is_plain(each):
                each.forward = SequentialForward(each)  # type: ignore[method-assign]
        elif type(each) is nn.TransformerEncoder:
            if all(map(_is_plain_encoder_layer, each.layers)):
                each.forward = EncoderForward(each)  # type: ignore[method-assign]
        elif type(each) is nn.Linear:
            if {"weight", "bias"} <= parameters_of(each).keys():
                each.forward = LinearForward(each)  # type: ignore[method-assign]
        elif type(each) is nn.MultiheadAttention:
            if is_plain_attention(each):
                each.forward = AttentionForward(each)  # type: ignore[method-assign]
        elif (step := step_of(each)) is not None and step.run is not None and not step.is_view:
            is_pool = type(each) in WINDOW_POOLS
            each.forward = PoolForward(step) if is_pool else LayerForward(step)


class LinearForward:
    """``forward`` of one ``nn.Linear`` of a template."""

    __slots__ = ("_parameters",)

    def __init__(self, module: nn.Linear) -> None:
        self._parameters = parameters_of(module)

    def __call__(self, input: Tensor) -> Tensor:
        """``input @ weight.T + bias``."""
        own = self._parameters
        return run_rule(linear, F.linear, input, own["weight"], own["bias"])


class LayerForward:
    """``forward`` of one layer of a template that has a rule."""

    __slots__ = ("_chain", "_module")

    def __init__(self, step: Step) -> None:
        self._module = step.module
        self._chain = Chain([step])

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer's class makes of ``input``."""
        # Of these layers no option changes anything if it is None or False.
        others = (*args, *kwargs.values())
        if type(input) is Tensor and all(other is None or other is False for other in others):
            found = self._chain.run(input, 0)
            if found is not None:
                return found[0]
        result: Tensor = type(self._module).forward(self._module, input, *args, **kwargs)
        return result


class PoolForward(LayerForward):
    """``forward`` of one pool, whose rule is faster for a member alone, too."""

    __slots__ = ("_run",)

    def __init__(self, step: Step) -> None:
        super().__init__(step)
        self._run = step.run

    def __call__(self, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The largest or the mean value of each window."""
        is_plain = type(input) is Tensor and not (args or kwargs)
        if is_plain and self._run is not None and is_outside():
            found = self._run(1, (input, None), _unchanged)
            if found is not None:
                return found[0]
        return super().__call__(input, *args, **kwargs)


def _unchanged(tensor: Tensor) -> Operand:
    return tensor, None


class SequentialForward:
    """``forward`` of one ``nn.Sequential`` of a template, or of other layers behind each other."""

    __slots__ = ("_modules", "_parts")

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._modules = list(layers)
        self._parts: list[nn.Module | Chain] = []
        chain: list[Step] = []
        for module in _flat(self._modules):
            step = step_of(module)
            if step is not None and (chain or step.run is not None):
                chain.append(step)
                continue
            self._parts += [Chain(chain), module] if chain else [module]
            chain = []
        self._parts += [Chain(chain)] if chain else []

    def chain(self) -> Chain | None:
        """The layers, if all of them are links of one chain."""
        first = self._parts[0] if len(self._parts) == 1 else None
        return first if isinstance(first, Chain) else None

    def __call__(self, input: Tensor) -> Tensor:
        """The layers one after another."""
        for part in self._modules if has_global_hooks() else self._parts:
            input = part(input)
        return input


class EncoderForward:
    """``forward`` of one ``nn.TransformerEncoder`` of a template."""

    __slots__ = ("_encoder", "_layers")

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self._encoder = encoder
        norm = [] if encoder.norm is None else [encoder.norm]
        self._layers = SequentialForward([*encoder.layers, *norm])

    def chain(self) -> Chain | None:
        """The layers, if all of them are links of one chain."""
        return self._layers.chain()

    def __call__(self, src: Tensor, *args: Any, **options: Any) -> Tensor:
        """The layers one after another; with masks as the encoder's own ``forward`` does it."""
        # Of masks and `is_causal` none changes anything if it is None or False. They are passed on
        # to the layers, of which only a hook or a layer of another class would take notice.
        given = (*args, *options.values())
        if all(each is None or each is False for each in given) and not has_global_hooks():
            return self._layers(src)
        return nn.TransformerEncoder.forward(self._encoder, src, *args, **options)


def _is_plain_encoder_layer(module: nn.Module) -> bool:
    is_seen = "forward" in vars(module) or any(hooks_of(module))
    return type(module) is nn.TransformerEncoderLayer and not is_seen


def _is_plain(module: nn.Sequential) -> bool:
    """Whether it does what ``nn.Sequential`` does, as subclasses that only choose layers do."""
    own, plain = type(module), nn.Sequential
    return (own.forward, own.__call__, own.__iter__) == (
        plain.forward,
        plain.__call__,
        plain.__iter__,
    )


def _flat(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """The layers, those of an inner Sequential at which nobody looks in its place."""
    for module in modules:
        is_seen = "forward" in vars(module) or any(hooks_of(module))
        if isinstance(module, nn.Sequential) and _is_plain(module) and not is_seen:
            yield from _flat(list(module))
        else:
            yield module


def _is_plain_pool(step: Step) -> bool:
    return not getattr(step.module, "return_indices", False)


class Chain:
    """Layers behind each other, of which all but an activation may be the first."""

    __slots__ = ("_steps",)

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = joined(steps)

    def __call__(self, x: Tensor) -> Tensor:
        """The layers one after another."""
        if type(x) is Tensor and is_outside():
            return self._of_one_member(x)
        k = 0
        while k < len(self._steps):
            found = self.run(x, k) if type(x) is Tensor else None
            if found is None:  # this layer itself has to run, or to say what is wrong
                x, k = self._steps[k].module(x), k + 1
            else:
                x, k = found
        return x

    def _of_one_member(self, x: Tensor) -> Tensor:
        grad = torch.is_grad_enabled()
        is_own = False
        k, steps = 0, self._steps
        while k < len(steps):
            module, _, activation, is_view, _, with_next, _ = steps[k]
            if activation is None:
                x = module(x)
                is_own = is_own or not is_view
            elif is_own and not grad:
                x = activation.in_place(x)
            elif (
                with_next is not None and not activation.overwrites and _is_plain_pool(steps[k + 1])
            ):
                x = activation.out_of_place(steps[k + 1].module(x))
                is_own, k = True, k + 1
            else:
                x = module(x)
                is_own = not activation.overwrites
            k += 1
        return x

    def run(self, x: Tensor, first: int) -> tuple[Tensor, int] | None:
        """As many layers from ``first`` on as can be, and which one comes next; None if none."""
        try:
            return run_chain(self._steps_from, x, first)
        except Exception as error:
            if is_end_of_recomputation(error):
                raise
            return None

    def whole(self, n: int, x: Operand, look: Look) -> Operand | None:
        """All layers on plain tensors; None where one has to run by itself."""
        result, reached = self._steps_from(n, x, look, 0)
        return result if reached == len(self._steps) else None

    def _steps_from(self, n: int, x: Operand, look: Look, first: int) -> tuple[Operand, int]:
        grad = torch.is_grad_enabled()
        # Whether x lies in memory that only the chain knows, and whether backward doesn't need it.
        is_own = is_product = False
        k, steps = first, self._steps
        while k < len(steps):
            _, run, activation, is_view, makes_product, with_next, overwriting = steps[k]
            writes_to_given = activation is not None and activation.overwrites and not is_own
            if with_next is not None and not writes_to_given:
                result = with_next(n, x, look)
                if result is not None:
                    x, is_own, is_product, k = result, True, False, k + 2
                    continue
            if activation is not None:
                # Backward needs the result of an activation, so the next one must not write to
                # it. And a product with more axes is a view, of which autograd copies the whole.
                free = is_product and x[0].dim() == 3 and activation.keeps_result if grad else True
                if is_own and free:
                    x = activation.in_place(x[0]), x[1]
                elif activation.overwrites and not is_own:
                    return x, k
                else:
                    x, is_own = (activation.out_of_place(x[0]), x[1]), True
                is_product, k = False, k + 1
                continue
            if overwriting is not None and is_own and not grad:
                run = overwriting
            assert run is not None
            result = run(n, x, look)
            if result is None:
                return x, k
            x, is_own, is_product, k = result, is_own or not is_view, makes_product, k + 1
        return x, k
