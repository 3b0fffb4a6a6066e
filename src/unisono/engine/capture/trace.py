"""A recorded call: tensor ops on places in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Origin = Literal["input", "weight", "constant", "op"]


class Ref(int):
    """The number of a value, where an op had a tensor."""

    __slots__ = ()


@dataclass(frozen=True)
class Value:
    """A place in memory: a storage, and the shape in which it is looked at.

    Two tensors with the same place are one value, so views that change nothing vanish by
    themselves. What the place holds changes when an op writes to it.
    """

    tensor: Tensor  # a tensor of that place, from the recording
    storage: int  # number of the storage

    @property
    def layout(self) -> tuple[Any, ...]:
        """Where in the storage which element lies."""
        t = self.tensor
        place = (tuple(t.shape), t.stride(), t.storage_offset())
        return (*place, t.dtype, t.device, t.is_conj(), t.is_neg())

    def permutes(self, other: Value) -> bool:
        """Whether it is the other with its axes in another order."""
        (shape, stride, *rest), (their_shape, their_stride, *theirs) = self.layout, other.layout
        axes = sorted(zip(shape, stride, strict=True))
        return axes == sorted(zip(their_shape, their_stride, strict=True)) and rest == theirs


@dataclass(frozen=True)
class Op:
    """One call of an ATen op."""

    target: Any  # the OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any  # None, a Ref, or a list of them
    written: frozenset[Ref] = frozenset()
    random: bool = False
    constant: bool = False  # what it computes depends on no input, weight or chance

    @property
    def name(self) -> str:
        """The op without namespace and overload: ``relu_``."""
        return str(self.target.overloadpacket.__name__)

    @property
    def reads(self) -> list[Ref]:
        """The tensors it takes, those it writes among them."""
        return list(refs((self.args, self.kwargs)))

    @property
    def results(self) -> list[Ref]:
        """The tensors it returns."""
        return list(refs(self.result))


@dataclass
class Trace:
    """A recorded call."""

    values: list[Value] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)  # of each storage
    ops: list[Op] = field(default_factory=list)
    inputs: list[Ref] = field(default_factory=list)
    weights: dict[Ref, str] = field(default_factory=dict)  # with their dotted names
    outputs: list[Ref] = field(default_factory=list)

    def add(self, tensor: Tensor, storage: int) -> Ref:
        """A new value."""
        self.values.append(Value(tensor, storage))
        return Ref(len(self.values) - 1)

    def origin(self, ref: Ref) -> Origin:
        """Where the value's storage comes from."""
        return self.origins[self.values[ref].storage]

    def tensor(self, ref: Ref) -> Tensor:
        """A tensor of that place."""
        return self.values[ref].tensor


def refs(args: Any) -> Iterator[Ref]:
    """Every Ref in the arguments of an op, or in its result."""
    if isinstance(args, Ref):
        yield args
    elif isinstance(args, dict):
        yield from refs(list(args.values()))
    elif isinstance(args, list | tuple):
        for arg in args:
            yield from refs(arg)


def map_args(fn: Callable[[Any], Any], args: Any) -> Any:
    """The arguments of an op with ``fn(leaf)`` for what is no list, tuple or dict."""
    if isinstance(args, dict):
        return {name: map_args(fn, arg) for name, arg in args.items()}
    if isinstance(args, list | tuple):
        return type(args)([map_args(fn, arg) for arg in args])
    return fn(args)


def is_random(target: Any) -> bool:
    """Whether the op draws random numbers."""
    return torch.Tag.nondeterministic_seeded in target.tags
