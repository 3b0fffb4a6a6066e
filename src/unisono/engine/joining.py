"""Cutting a parameter into those of its members, whose gradients are joined where the last were.

An ensemble has one gradient for all members. If they run one by one, N gradients are copied into
it in every step, and of a large one the copy is the smaller part: a C library gives memory of
32 MB and more back to the system as soon as it is free, and whoever writes to new memory waits
for each page of it. So the memory is kept, and used again once nobody has the gradient any more.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from unisono.engine.axis import backward_pass, is_observed, is_unheld

_SMALLEST: Final = 1 << 20  # bytes; what is smaller the C library keeps itself

Rooms = dict[str, Tensor]
"""Name of a parameter -> memory of its size, with which a gradient was stored before."""


class Home(NamedTuple):
    """Where the gradients of one parameter live."""

    name: str
    rooms: Rooms

    def room_for(self, like: Tensor) -> Tensor:
        """Memory to write a gradient to: what the last one had, if nobody has it any more."""
        room = self.rooms.pop(self.name, None)  # one step: two threads never get the same one
        if room is None or not _fits(room, like) or not is_unheld(room):
            room = torch.empty_like(like)
        return room

    def keep(self, room: Tensor) -> Tensor:
        """The gradient that was written there, of which others may know from now on."""
        joined = room.detach()  # before others find the room, or it would seem to be nobody's
        self.rooms[self.name] = room
        return joined


class _Running(threading.local):
    """The call that this thread runs: where its gradients live, and its parameters by name."""

    rooms: Rooms | None = None
    names: Sequence[str] = ()
    values: Sequence[Any] = ()


_running = _Running()


@contextmanager
def rooms_of_call(rooms: Rooms, names: Sequence[str], values: Sequence[Any]) -> Iterator[None]:
    """Let rules find with `home_of` where the gradients of the parameters that they get live.

    Args:
        rooms: Where memory is kept.
        names: The dotted names of the call's tensors.
        values: The tensors.
    """
    before = _running.rooms, _running.names, _running.values
    _running.rooms, _running.names, _running.values = rooms, names, values
    try:
        yield
    finally:
        _running.rooms, _running.names, _running.values = before


def home_of(tensor: Tensor) -> Home:
    """Where the gradient of a parameter of the call lives; of another tensor, in new memory."""
    if _running.rooms is not None and tensor.is_leaf:
        for name, value in zip(_running.names, _running.values, strict=True):
            if value is tensor:
                return Home(name, _running.rooms)
    return Home("", {})


def members_of(parameter: Tensor, name: str, rooms: Rooms) -> Sequence[Tensor]:
    """Views of the members' parameters; their gradients arrive joined, in the parameter's order.

    Args:
        parameter: Of all members.
        name: Its dotted name.
        rooms: Where memory is kept, and looked for.

    Shape:
        - parameter: (N, *)
        - returns: N tensors (*)
    """
    is_worth_it = (
        parameter.requires_grad
        and type(parameter) in (Tensor, nn.Parameter)
        and parameter.device.type == "cpu"  # elsewhere torch keeps memory itself
        and parameter.nbytes >= _SMALLEST
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_observed()
    )
    if not is_worth_it:
        return parameter.unbind()
    return _Rows(parameter, Home(name, rooms))


class _Rows(Sequence[Tensor]):
    """A parameter cut by member, whose gradients meet in one memory.

    Member i's part is made when it is asked for, before the member runs. Autograd goes backwards
    in time, so its gradient is copied when that member is done, not when all are: while it is in
    the cache, and the memory it had is there for the next member's.
    """

    def __init__(self, parameter: Tensor, home: Home) -> None:
        self._joint = _Joint(parameter.detach(), home)
        self._views: Sequence[Tensor] = _Members.apply(  # type: ignore[no-untyped-call]
            parameter, self._joint
        )
        self._rows: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._views)

    def __getitem__(self, i: Any) -> Any:
        if i not in self._rows:
            row = _Row.apply(self._views[i], i, self._joint)  # type: ignore[no-untyped-call]
            self._rows[i] = row
        return self._rows[i]


class _Joint:
    """The memory in which the gradients of one call's members meet, in each pass backwards."""

    def __init__(self, like: Tensor, home: Home) -> None:
        self.like = like
        self.home = home
        self._rooms: dict[int, tuple[Tensor, Sequence[Tensor]]] = {}  # threads may pass at once

    def write(self, i: int, gradient: Tensor | None) -> Tensor:
        """Copy member i's gradient to its place, unless it lies there; the place."""
        current = backward_pass()
        if current not in self._rooms:
            room = self.home.room_for(self.like)
            self._rooms[current] = room, room.unbind()
        row = self._rooms[current][1][i]
        if gradient is None:
            row.zero_()
        elif gradient.data_ptr() != row.data_ptr() or gradient.stride() != row.stride():
            row.copy_(gradient)
        return row

    def finish(self) -> Tensor:
        """The gradient of all members."""
        room, _ = self._rooms.pop(backward_pass())
        return self.home.keep(room)


class _Members(torch.autograd.Function):
    """`Tensor.unbind` with another backward: ``grad[i] = grads[i]`` in memory that was kept."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, joint: _Joint) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.joint = joint
        return tuple(parameter.unbind())

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, joint: None) -> tuple[Tensor, ...]:
        return tuple(tangent.unbind())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        joint = ctx.joint
        # It will itself be differentiated, or is sparse, as that of `nn.Embedding(sparse=True)`.
        if torch.is_grad_enabled() or any(g is not None and _is_sparse(g) for g in grads):
            return _stacked([_or_zero(g, joint.like[0]) for g in grads]), None
        for i, gradient in enumerate(grads):
            joint.write(i, gradient)
        return joint.finish(), None


class _Row(torch.autograd.Function):
    """One member's part, as it is; its gradient is copied to where those of all members meet."""

    @staticmethod
    def forward(ctx: Any, view: Tensor, i: int, joint: _Joint) -> Tensor:
        ctx.i, ctx.joint = i, joint
        return view.view_as(view)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, i: None, joint: None) -> Tensor:
        return tangent.view_as(tangent)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled() or _is_sparse(gradient):
            return gradient, None, None
        row: Tensor = ctx.joint.write(ctx.i, gradient)
        return row, None, None


def _fits(room: Tensor, like: Tensor) -> bool:
    return (room.shape, room.stride(), room.dtype) == (like.shape, like.stride(), like.dtype)


def _or_zero(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def _is_sparse(gradient: Tensor) -> bool:
    return gradient.layout is not torch.strided


def _stacked(rows: list[Tensor]) -> Tensor:
    """Sparse if all of them are."""
    if any(map(_is_sparse, rows)) and not all(map(_is_sparse, rows)):
        rows = [row.to_dense() for row in rows]
    return torch.stack(rows)
