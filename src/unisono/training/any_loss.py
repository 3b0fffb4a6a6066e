"""The losses of all members by any function: at once, and by a loop where that can't be."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any, Final

import torch
from torch import Tensor, nn

from unisono.engine import rng
from unisono.engine.axis import hooks_of, is_end_of_recomputation
from unisono.engine.call import fused
from unisono.engine.inputs import PerMember, tensors_in
from unisono.engine.opbyop.remedies import remedy_for
from unisono.engine.parts import Call, Parts
from unisono.engine.planning.signature import kind_of
from unisono.engine.pool import Pool
from unisono.engine.traced.call import run_traced
from unisono.engine.tree import leaves
from unisono.engine.where import caller_level, first_sentence
from unisono.errors import EnsembleWarning
from unisono.stacking import make_template, stack
from unisono.training.gaussian_nll import GaussianNLLAtOnce

LossFn = Callable[[Any, Any], Any]
Way = Callable[[LossFn, Call], Any]

_MOST = 256
_NO_MEMBER: Final = nn.Identity()
# Of a member without tensors: a function needs none.
_POOL: Final = Pool(make_template(_NO_MEMBER), stack([_NO_MEMBER]), frozenset())


def losses_by(loss_fn: LossFn, outputs: Any, targets: Any, n: int) -> Any:
    """Run ``loss_fn(output, target)`` for all members, and remember which way it can run.

    Args:
        loss_fn: Any function.
        outputs: A tree of tensors with the member axis in front.
        targets: A tree of tensors, what is of the members marked.
        n: The number of members.

    Returns:
        What the function returns, with the member axis in front.
    """
    call = Call(lambda _, *args: loss_fn(*args), (PerMember(outputs), targets), {}, n, "different")
    if torch.compiler.is_compiling():
        return run_traced(_POOL, call, "fused", None)
    kind = kind_of(loss_fn)
    known = _ways.get(kind)
    state = None if known else rng.get_state(rng.devices_of(tensors_in(call.args, {})))
    failure: Exception | None = None
    for way in _WAYS[_WAYS.index(known) if known else 0 :]:
        try:
            losses = way(loss_fn, call)
        except Exception as error:
            if way is _by_loop or is_end_of_recomputation(error):
                raise
            failure = failure or error
            if state is not None:
                rng.set_state(state)
        else:
            break
    if way is not known:
        if len(_ways) >= _MOST:
            _ways.clear()
        _ways[kind] = way
        if way is _by_loop and failure is not None:
            warnings.warn(_loop_text(loss_fn, n, failure), EnsembleWarning, caller_level())
    return losses


def name_of(loss_fn: LossFn) -> str:
    """What the user calls the function, for a message: `huber` (train.py:12)."""
    fn: Any = loss_fn
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", type(fn).__name__).rpartition("<locals>.")[2]
    code = getattr(fn, "__code__", None)
    if not isinstance(code, CodeType):
        return f"`{name}`"
    return f"`{name}` ({Path(code.co_filename).name}:{code.co_firstlineno})"


def one_number_each(loss_fn: LossFn, losses: Any, n: int) -> Tensor:
    """The losses as (N), or the error that says what the function returned instead.

    Args:
        loss_fn: The function, for the message.
        losses: What it returned, a tensor with the member axis in front or something else.
        n: The number of members.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(
            f"member_losses: {name_of(loss_fn)} returns a {type(losses).__name__}, but the loss of"
            f" a member is a tensor with one number; return a tensor, without .item(), and the loss"
            f" alone: lambda output, target: loss_fn(output, target)[0]"
        )
    if losses.numel() != n:
        raise ValueError(
            f"member_losses: {name_of(loss_fn)} returns a tensor of shape"
            f" {tuple(losses.shape[1:])} for each member, but the loss of a member is one number;"
            f" use reduction='mean', or lambda output, target: loss_fn(output, target).mean()"
        )
    return losses if losses.dim() == 1 else losses.reshape(n)


def _at_once(loss_fn: LossFn, call: Call) -> Any:
    """All members in one run of the function."""
    if isinstance(loss_fn, nn.Module) and torch.is_grad_enabled():
        for module in loss_fn.modules():
            if any(hooks_of(module)[2:]):
                kind = type(module).__name__
                raise RuntimeError(f"{kind} has a backward hook, which sees one member's gradients")
    template = _POOL.take()
    try:
        return fused(template, (), call).outputs
    finally:
        _POOL.give_back(template)


def _at_once_with_variances(loss_fn: LossFn, call: Call) -> Any:
    """All members in one run in which `F.gaussian_nll_loss` works; a mode makes each op slower."""
    with GaussianNLLAtOnce():
        return _at_once(loss_fn, call)


def _by_loop(loss_fn: LossFn, call: Call) -> Any:
    """One member after another; an error is then the function's own."""
    template = _POOL.take()
    try:
        parts = Parts(template, (), call, Tensor.unbind)
        losses = []
        for i in range(call.n):
            (output, target), _ = parts.inputs(i)
            try:
                loss = loss_fn(output, target)
            except Exception as error:
                error.add_note(_place(loss_fn, call, i, output, target))
                raise
            alone = loss.unsqueeze(0) if isinstance(loss, Tensor) else loss
            losses.append(one_number_each(loss_fn, alone, 1))
        return torch.cat(losses)
    finally:
        _POOL.give_back(template)


_WAYS: Final[tuple[Way, ...]] = (_at_once, _at_once_with_variances, _by_loop)
_ways: dict[Any, Way] = {}  # what is alike for functions that are made anew for each call -> way


def _place(loss_fn: LossFn, call: Call, i: int, output: Any, target: Any) -> str:
    """Where an error came from; and what is unmarked though it seems to be of the members."""
    facts = [f"output{path} {_text(leaf)}" for path, leaf in leaves(output)]
    facts += [f"target{path} {_text(leaf)}" for path, leaf in leaves(target)]
    text = f"member_losses: raised by {name_of(loss_fn)} for member {i}: {', '.join(facts)}"
    for path, leaf in leaves(call.args[1], "targets"):
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == call.n:
            text += (
                f"\n{path} {_text(leaf)} is seen whole by every member; if axis 0 is the member:"
                f" member_losses(loss_fn, outputs, per_member(targets))"
            )
    return text


def _text(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
    return type(leaf).__name__


def _loop_text(loss_fn: LossFn, n: int, reason: Exception) -> str:
    why = f"{type(reason).__name__}: {first_sentence(str(reason))}"
    return (
        f"member_losses: {name_of(loss_fn)} can't be computed for all {n} members at once, so from"
        f" now on it runs for one member after another."
        f"\n  reason: {why}"
        f"\n  remedy: {remedy_for(why) or 'rewrite it with batched operations'};"
        f" torch.stack([loss_fn(output, target) for output in outputs]) is the loop, and says"
        f" nothing"
    )
