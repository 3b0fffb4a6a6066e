"""Ops that can't run for all members at once, run for one member after another, and only they.

`Detours` sees every function of torch that ``forward`` calls. It costs a microsecond or two for
each, so it is entered only for a forward that has failed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unisono.engine import rng
from unisono.engine.axis import attach, below, detach, is_innermost
from unisono.engine.kernels import for_each_member
from unisono.engine.opbyop.conventions import MAKES_TENSORS, NOT_OF_PARTS, name_of, written_by
from unisono.engine.opbyop.derivatives import ON_STACKED, backward_of_members, grad_of_members
from unisono.engine.parts import Call
from unisono.engine.tree import leaves, transpose, tree_map
from unisono.engine.where import first_sentence, place


class Detour(NamedTuple):
    """One function that ran for one member after another."""

    path: str  # the module, as `locate` names it
    line: str  # of the user's code: "model.py:12"
    op: str
    reason: str


class Stop(BaseException):
    """The members go different ways from here.

    No `Exception`: a forward that catches those must not take the branch for a failed op.
    """

    def __init__(self, detour: Detour) -> None:
        super().__init__(detour)
        self.detour = detour


class _Operand(NamedTuple):
    leaf: Tensor  # as forward sees it
    value: Tensor  # stacked
    dim: int | None  # where the members are
    columns: Sequence[Tensor]  # one for each member


class Detours(TorchFunctionMode):
    """Run what fails inside the member axis ``level`` for one member after another.

    Args:
        level: The member axis.
        call: The call that runs in it.
        member: The tree on which ``forward`` runs.
        found: Gets one entry for each place where it was necessary.
    """

    def __init__(self, level: int, call: Call, member: nn.Module, found: list[Detour]) -> None:
        super().__init__()
        self._level = level
        self._n = call.n
        self._randomness = call.randomness
        self._member = member
        self._found = found

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """``func(*args, **kwargs)``, for all members at once or one after another."""
        if not is_innermost(self._level):  # forward uses transforms of its own
            return func(*args, **kwargs)
        if func in ON_STACKED:
            return self._on_stacked(func, args, kwargs)
        if func is torch.autograd.grad:
            return grad_of_members(self._level, *args, **kwargs)
        if func is Tensor.backward:
            return backward_of_members(self._level, *args, **kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            reason = error
        else:
            return self._own(result) if func in MAKES_TENSORS else result
        return self._by_member(func, args, kwargs, reason)

    def _own(self, result: Tensor) -> Tensor:
        """A fresh tensor for each member; integers of `torch.tensor` are indices, mostly."""
        value, dim = detach(result, self._level)
        if dim is not None or not result.is_floating_point():
            return result
        with below():
            stacked = value.expand(self._n, *value.shape).clone()
        return attach(stacked, self._level)

    def _on_stacked(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What only reads or sets a property of one tensor, done to that of all members."""
        value, dim = detach(args[0], self._level)
        with below():
            result = func(value, *args[1:], **kwargs)
        if result is value:
            return args[0]
        if isinstance(result, Tensor) and dim is not None:
            return attach(result, self._level, dim)
        return result

    def _by_member(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        reason: Exception,
    ) -> Any:
        call = (args, dict(kwargs))
        if getattr(func, "__name__", "") in NOT_OF_PARTS:
            raise reason
        written = written_by(func, call)
        operands: dict[int, _Operand] = {}
        for _, leaf in leaves(call):
            if isinstance(leaf, Tensor) and id(leaf) not in operands:
                operands[id(leaf)] = self._operand(leaf, writes=written is not None)
            elif callable(leaf) and not isinstance(leaf, type):
                raise reason  # it may refer to tensors that we don't see here
        if all(operand.dim is None for operand in operands.values()):
            raise reason
        if written is not None and not _has_room_for_each(operands[id(written)]):
            raise reason  # one place can't hold what N members write

        def run_member(i: int) -> Any:
            own_args, own_kwargs = tree_map(
                lambda leaf: operands[id(leaf)].columns[i] if isinstance(leaf, Tensor) else leaf,
                call,
            )
            return func(*own_args, **own_kwargs)

        devices = rng.devices_of(operand.value for operand in operands.values())
        with below():
            results = for_each_member(run_member, self._n, self._randomness, devices)
            result = self._join(results, list(operands.values()), func, call)
        self._note(func, call, str(reason))
        return result

    def _operand(self, leaf: Tensor, *, writes: bool) -> _Operand:
        value, dim = detach(leaf, self._level)
        with below():
            if dim is None:
                columns: Sequence[Tensor] = [value] * self._n
            elif writes:  # into views that unbind made, autograd allows no writes
                columns = [value.select(dim, i) for i in range(self._n)]
            else:
                columns = value.unbind(dim)
        return _Operand(leaf, value, dim, columns)

    def _join(
        self, results: list[Any], operands: list[_Operand], func: Callable[..., Any], call: Any
    ) -> Any:
        def stop(why: str) -> NoReturn:
            raise Stop(self._detour(func, call, why))

        def combine(path: str, column: list[Any]) -> Any:
            first = column[0]
            if not all(isinstance(item, Tensor) for item in column):
                if not all(_is_same(item, first) for item in column):
                    stop(f"the members gave different values: {_listed(column)}")
                return first
            if len({(item.shape, item.dtype, item.layout) for item in column}) > 1:
                shapes = _listed([tuple(item.shape) for item in column])
                stop(f"the members gave tensors of different shapes: {shapes}")
            if first.layout is not torch.strided and first.requires_grad:
                stop("a sparse tensor with a gradient can't be stacked")
            for operand in operands:
                if first is operand.columns[0]:
                    return operand.leaf
                if _shares_memory(first, operand.value):
                    view = _joined_view(column, operand.value)
                    if view is None:
                        stop("the members gave views of different places")
                    return attach(view, self._level)
            return attach(torch.stack(column), self._level)

        try:
            return transpose(results, combine)
        except ValueError as error:
            stop(str(error))

    def _detour(self, func: Callable[..., Any], call: Any, reason: str) -> Detour:
        path, line = place(self._member)
        return Detour(path, line, name_of(func, call), reason)

    def _note(self, func: Callable[..., Any], call: Any, reason: str) -> None:
        detour = self._detour(func, call, first_sentence(reason))
        if detour not in self._found:
            self._found.append(detour)


def _has_room_for_each(operand: _Operand) -> bool:
    if operand.dim is None:
        return False
    return len(operand.columns) == 1 or operand.value.stride(operand.dim) != 0


def _is_same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    same = a == b
    return bool(same.all()) if hasattr(same, "all") else bool(same) or (a != a and b != b)


def _shares_memory(tensor: Tensor, value: Tensor) -> bool:
    if tensor.layout is not torch.strided or value.layout is not torch.strided:
        return False
    pointer: int = tensor.untyped_storage().data_ptr()
    return pointer != 0 and pointer == value.untyped_storage().data_ptr()


def _joined_view(column: Sequence[Tensor], value: Tensor) -> Tensor | None:
    """One view of the stacked tensor from one for each member; None if there is no such view."""
    first = column[0]
    offsets = [tensor.storage_offset() for tensor in column]
    step = offsets[1] - offsets[0] if len(column) > 1 else 0
    regular = [offsets[0] + step * i for i in range(len(column))] == offsets
    alike = len({tensor.stride() for tensor in column}) == 1 and first.dtype == value.dtype
    if not (regular and alike and step >= 0) or first.is_conj() != value.is_conj():
        return None
    shape, strides = (len(column), *first.shape), (step, *first.stride())
    return value.as_strided(shape, strides, offsets[0])


def _listed(column: Sequence[Any]) -> str:
    shown = list(dict.fromkeys(repr(item) for item in column))
    return ", ".join(shown[:5]) + (", ..." if len(shown) > 5 else "")
