"""Run a call for its time alone: nothing of it stays."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unisono.engine import rng
from unisono.engine.axis import hooks_of
from unisono.engine.call import Strategy
from unisono.engine.inputs import tensors_in
from unisono.engine.parts import Call
from unisono.engine.planning.plan import MemoryFormat
from unisono.engine.planning.storage import in_format
from unisono.engine.template import Template
from unisono.engine.tree import leaves


class Rehearsal:
    """A call on stand-ins: parameters without history, copies of buffers and of inputs.

    Gradients go nowhere, buffers and random state stay, what ``forward`` assigns is forgotten,
    and the users' own hooks don't run.

    Args:
        template: The template that runs the call.
        call: What to run.
    """

    def __init__(self, template: Template, call: Call) -> None:
        self._template = template
        self._values = [
            _stand_in(value, slot.kind == "buffer")
            for slot, value in zip(template.slots, template.values(), strict=True)
        ]
        # In one go: attention asks whether queries and keys are one and the same object.
        args, kwargs = copied((call.args, dict(call.kwargs)))
        self._call = call._replace(args=args, kwargs=kwargs)
        self._formats: dict[MemoryFormat, list[Any]] = {}
        self._devices = rng.devices_of(self._values)

    def run(self, strategy: Strategy, memory_format: MemoryFormat) -> Any:
        """The outputs of one run, forward only."""
        with self._undisturbed():
            return strategy(self._template, self._in(memory_format), self._call).outputs

    def seconds(self, strategy: Strategy, memory_format: MemoryFormat) -> float:
        """The time of one run: forward, and backward if gradients are recorded."""
        values = self._in(memory_format)
        with self._undisturbed():
            self._wait()
            start = time.perf_counter()
            outputs = strategy(self._template, values, self._call).outputs
            if torch.is_grad_enabled():
                self._backward(outputs, values)
            self._wait()
            return time.perf_counter() - start

    def _in(self, memory_format: MemoryFormat) -> list[Any]:
        if memory_format not in self._formats:
            self._formats[memory_format] = in_format(self._template, self._values, memory_format)
        return self._formats[memory_format]

    def _backward(self, outputs: Any, values: Sequence[Any]) -> None:
        ends = [leaf for _, leaf in leaves(outputs) if isinstance(leaf, Tensor)]
        ends = [leaf for leaf in ends if leaf.requires_grad]
        tensors = [leaf for _, leaf in leaves(values) if isinstance(leaf, Tensor)]
        tensors += tensors_in(self._call.args, self._call.kwargs)
        starts = {id(leaf): leaf for leaf in tensors if leaf.is_leaf and leaf.requires_grad}
        if ends and starts:
            slopes = [torch.ones_like(end) for end in ends]
            given = list(starts.values())
            grads = torch.autograd.grad(ends, given, slopes, allow_unused=True)
            for start, grad in zip(given, grads, strict=True):
                # A parameter's gradient is kept in the parameter's order, by a copy if need be.
                if grad is not None and grad.stride() != start.stride():
                    torch.empty_like(start, requires_grad=False).copy_(grad)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Put back the random state, and keep the users' hooks and torch's advice out."""
        state = rng.get_state(self._devices)
        hooks = [h for module in self._template.module.modules() for h in hooks_of(module)]
        kept = [(registered, dict(registered)) for registered in hooks if registered]
        for registered, all_of_them in kept:
            for key, hook in all_of_them.items():
                if not _is_of_torch(hook):
                    del registered[key]
        try:
            with warnings.catch_warnings():
                # Of its slow batching rules torch warns also where another way is going to win.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                yield
        finally:
            for registered, all_of_them in kept:
                registered.clear()
                registered.update(all_of_them)
            rng.set_state(state)

    def _wait(self) -> None:
        for device in self._devices:
            torch.get_device_module(device).synchronize(device)


def copied(tree: Any) -> Any:
    """The tree with copies of everything in it that a call might change."""
    memo: dict[int, Any] = {}  # deepcopy takes these for what is done already
    for _, leaf in leaves(tree):
        if callable(leaf):
            memo[id(leaf)] = leaf
    for tensor in tensors_in((tree,), {}):
        memo[id(tensor)] = _leaf(tensor.detach().clone(), tensor)
    return copy.deepcopy(tree, memo)


def _stand_in(value: Any, is_buffer: bool) -> Any:
    if isinstance(value, Tensor) and not is_buffer:
        return _leaf(value.detach(), value)
    return copied(value)


def _leaf(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.requires_grad_(like.requires_grad and torch.is_grad_enabled())


def _is_of_torch(hook: Callable[..., Any]) -> bool:
    """Whether the hook does part of the forward, as that of weight_norm or of pruning does."""
    home = hook if hasattr(hook, "__qualname__") else type(hook)
    return str(home.__module__).split(".")[0] == "torch"
