"""One call for all members: template + stacked tensors + inputs -> stacked outputs.

`fused`, `vmap` and `loop` are three ways to the same numbers. None of them changes the ensemble
except through in-place writes to its buffers; what ``forward`` assigned is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from unisono.engine.axis import attach, attach_all, detach, member_axis
from unisono.engine.inputs import map_inputs, per_member
from unisono.engine.joining import members_of, rooms_of_call
from unisono.engine.kernels import install
from unisono.engine.outputs import check_arguments, check_leaf
from unisono.engine.parts import Assigned, Call, Parts, Result
from unisono.engine.rules import BY_MEMBER, RULES
from unisono.engine.straight import straight
from unisono.engine.template import Template
from unisono.engine.tree import leaves, tree_map
from unisono.engine.watch import Write
from unisono.engine.where import locate

_AT_ONCE = 'while all members ran at once; strategy="loop" runs them one by one'

Strategy = Callable[[Template, Sequence[Any], Call], Result]
"""Takes the template, a value for each of its slots, and what to run."""


def fused(template: Template, values: Sequence[Any], call: Call) -> Result:
    """Run ``forward`` once, every tensor standing for those of all members."""
    if not torch.is_grad_enabled():
        return _fused(template, values, call)
    with rooms_of_call(template.rooms, template.names, values):
        return _fused(template, values, call)


def _fused(template: Template, values: Sequence[Any], call: Call) -> Result:
    known = straight(template, values, call)
    return at_once(template, values, call, _nothing_around) if known is None else known


def at_once(
    template: Template,
    values: Sequence[Any],
    call: Call,
    around: Callable[[int], AbstractContextManager[Any]],
) -> Result:
    """Run ``forward`` once, inside ``around(level)``."""
    _refuse_backward_hooks(template)
    install(RULES, BY_MEMBER)
    with member_axis(call.n, call.randomness) as level:

        def enter(leaf: Any) -> Any:
            return attach(leaf, level) if isinstance(leaf, Tensor) else leaf

        def is_of_members(tensor: Tensor) -> bool:
            return detach(tensor, level)[1] is not None

        def leave(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                check_leaf(leaf, is_of_members)
                return leaf
            value, dim = detach(leaf, level)
            if dim is None:  # the same for all members; a copy, so that each can be written to
                if value.layout is not torch.strided:
                    return torch.stack([value] * call.n)
                return value.expand(call.n, *value.shape).clone()
            return value.movedim(dim, 0) if dim else value

        def join(write: Write) -> Assigned:
            stacked = any(
                isinstance(leaf, Tensor) and detach(leaf, level)[1] is not None
                for _, leaf in leaves(write.value)
            )
            value = tree_map(leave, write.value) if stacked else write.value
            return _assigned(write._replace(value=value), stacked)

        args, kwargs = map_inputs(call.args, call.kwargs, enter)
        given = (
            attach_all(values, level)
            if template.holds_stacked_tensors
            else [
                (attach(value, level) if isinstance(value, Tensor) else tree_map(enter, value))
                if slot.stacked
                else value
                for slot, value in zip(template.slots, values, strict=True)
            ]
        )
        try:
            with template.filled(given) as writes, around(level):
                outputs = call.fn(template.module, *args, **kwargs)
        except Exception as error:
            _add_place(error, template, _AT_ONCE)
            raise
        check_arguments(call, is_of_members)
        joined = leave(outputs) if type(outputs) is Tensor else tree_map(leave, outputs)
        return Result(joined, [join(write) for write in writes])


def _nothing_around(level: int) -> AbstractContextManager[None]:
    return nullcontext()


def vmap(template: Template, values: Sequence[Any], call: Call) -> Result:
    """Run PyTorch's model-ensembling recipe: ``torch.vmap`` over ``functional_call``.

    https://docs.pytorch.org/tutorials/intermediate/ensembling.html
    """
    _refuse_backward_hooks(template)
    slots = template.slots
    base = _Recorder(template, call.fn)
    trace: list[Any] = []  # containers, and leaves that aren't tensors, of the one run

    def run(tensors: list[Any], inputs: list[Tensor], _: Tensor) -> list[Tensor]:
        marked = iter(inputs)
        args, kwargs = map_inputs(call.args, call.kwargs, lambda _: next(marked))
        state = {
            f"member.{slot.name}": tensor
            for slot, tensor in zip(slots, tensors, strict=True)
            if slot.kind != "attribute"
        }
        # Every name of a tied tensor is in the state, so there is nothing left to tie.
        result = torch.func.functional_call(base, state, (tensors, args, kwargs), tie_weights=False)
        trace.append(result)
        return [leaf for _, leaf in leaves(result) if isinstance(leaf, Tensor)]

    def axes(value: Any) -> Any:
        return tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, value)

    tensor_axes = [
        axes(value) if slot.stacked else None for slot, value in zip(slots, values, strict=True)
    ]
    inputs: list[Tensor] = []
    map_inputs(call.args, call.kwargs, inputs.append)
    counter = torch.empty(call.n)  # an axis also for a call without any stacked tensor
    in_dims = (tensor_axes, [0] * len(inputs), 0)
    mapped_run = torch.vmap(run, in_dims, randomness=call.randomness)
    try:
        mapped = mapped_run(list(values), inputs, counter)
    except Exception as error:
        _add_place(error, template, _AT_ONCE)
        raise
    stacked = iter(mapped)
    outputs, writes = tree_map(
        lambda leaf: next(stacked) if isinstance(leaf, Tensor) else leaf, trace[0]
    )
    return Result(outputs, [_assigned(write, _has_tensor(write.value)) for write in writes])


class _Recorder(nn.Module):
    """``fn(member, ...)`` as a module for ``functional_call``, which returns also the writes.

    Filling the template again adds what ``functional_call`` doesn't know of: other references
    to the same tensors, and attributes that hold one value per member.
    """

    def __init__(self, template: Template, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.member = template.module
        self.template = template
        self.fn = fn

    def forward(
        self, values: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, list[Write]]:
        with self.template.filled(values) as writes:
            outputs = self.fn(self.member, *args, **kwargs)
        return outputs, writes


def loop(template: Template, values: Sequence[Any], call: Call) -> Result:
    """Run the members one after another, on views of the stacked tensors."""
    cut_parameter = partial(members_of, rooms=template.rooms)
    parts = Parts(template, values, call, Tensor.unbind, cut_parameter)
    results = []
    for i in range(call.n):
        args, kwargs = parts.inputs(i)
        try:
            with parts.random_state(i), template.filled(parts.values(i)) as writes:
                outputs = call.fn(template.module, *args, **kwargs)
        except Exception as error:
            _add_place(error, template, f"of member {i}")
            raise
        results.append(Result(outputs, [_assigned(write, False) for write in writes]))
    return parts.join(results, torch.stack)


def in_chunks(strategy: Strategy, size: int) -> Strategy:
    """The strategy that runs ``strategy`` over ``size`` members at a time."""

    def run(template: Template, values: Sequence[Any], call: Call) -> Result:
        parts = Parts(template, values, call, lambda tensor: torch.split(tensor, size))
        results = []
        for k, start in enumerate(range(0, call.n, size)):
            chunk = _chunk(parts, k, call, min(size, call.n - start))
            with parts.random_state(k):
                results.append(strategy(template, parts.values(k), chunk))
        return parts.join(results, torch.cat)

    return run


def first_members(
    size: int, template: Template, values: Sequence[Any], call: Call
) -> tuple[list[Any], Call]:
    """The values and the call of the first ``size`` members alone."""
    parts = Parts(template, values, call, lambda tensor: torch.split(tensor, size))
    return parts.values(0), _chunk(parts, 0, call, size)


def _chunk(parts: Parts, k: int, call: Call, n: int) -> Call:
    args, kwargs = parts.inputs(k, mark=per_member)
    return call._replace(args=args, kwargs=kwargs, n=n)


def _refuse_backward_hooks(template: Template) -> None:
    if template.backward_hooks and torch.is_grad_enabled():
        path = template.backward_hooks[0]
        raise RuntimeError(
            f"{f'`{path}`' if path else 'the member'} has a backward hook, which is called with the"
            f" gradients of one member"
        )


def _add_place(error: Exception, template: Template, when: str) -> None:
    """Add to an error where in the member it was raised."""
    error.add_note(f"ens(...): raised in {locate(error, template.module)} {when}")


def _assigned(write: Write, stacked: bool) -> Assigned:
    return Assigned(write.path, write.key, write.kind, write.value, stacked)


def _has_tensor(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) for _, leaf in leaves(tree))
