"""The example inputs of an export: their names, and which of their axes is the batch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unisono.engine.inputs import PerMember
from unisono.engine.tree import leaves, tree_map

BatchAxes = int | None | Mapping[str, int | None]
"""The batch axis of the inputs as a member sees them, None for a fixed shape; or by name."""

_PART = re.compile(r"\[(?:'([^']*)'|([^\]]*))\]|\.(\w+)")


@dataclass(frozen=True)
class Input:
    """One tensor among the arguments.

    Args:
        name: ``x``, or ``batch.mask`` for a tensor inside of an argument.
        tensor: The example, with the member axis if it is marked.
        is_per_member: Whether it is marked with `per_member`.
        batch_axis: The axis of ``tensor`` whose length may change; None if none may.
    """

    name: str
    tensor: Tensor
    is_per_member: bool
    batch_axis: int | None


@dataclass(frozen=True)
class Example:
    """Example arguments of a call.

    Args:
        call: The public call, for messages.
        args: With `per_member` marks, as for the call of an ensemble.
        kwargs: Likewise.
        inputs: The tensors in them, in order.
    """

    call: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: tuple[Input, ...]

    @property
    def batch_sizes(self) -> dict[str, int]:
        """The lengths of the batch axes, by the inputs' names; they agree."""
        return {
            i.name: i.tensor.shape[i.batch_axis] for i in self.inputs if i.batch_axis is not None
        }

    @property
    def batch_size(self) -> int | None:
        """The length of the batch axes; None if all shapes are fixed."""
        return next(iter(self.batch_sizes.values()), None)

    def by_name(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors in the order of the inputs, by their names."""
        return {i.name: tensor for i, tensor in zip(self.inputs, tensors, strict=True)}

    def filled(self, tensors: Iterator[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors, with their marks."""

        def other(leaf: Any) -> Any:
            if isinstance(leaf, PerMember):
                return PerMember(tree_map(other, leaf.tree))
            return next(tensors) if isinstance(leaf, Tensor) else leaf

        args = tuple([tree_map(other, arg) for arg in self.args])
        return args, {name: tree_map(other, arg) for name, arg in self.kwargs.items()}

    def unmarked(self, tensors: Iterator[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with something else for each tensor, and without marks."""

        def other(leaf: Any) -> Any:
            if isinstance(leaf, PerMember):
                return tree_map(other, leaf.tree)
            return next(tensors) if isinstance(leaf, Tensor) else leaf

        args = tuple([tree_map(other, arg) for arg in self.args])
        return args, {name: tree_map(other, arg) for name, arg in self.kwargs.items()}

    def rows(self, size: int) -> list[Tensor]:
        """The tensors with a batch of another size: their rows, from the first on again and again.

        Args:
            size: The length of the batch axes; those of a fixed shape stay as they are.
        """
        tensors = []
        for each in self.inputs:
            if each.batch_axis is None:
                tensors.append(each.tensor)
                continue
            index = torch.arange(size, device=each.tensor.device)
            own = index % each.tensor.shape[each.batch_axis]
            tensors.append(each.tensor.index_select(each.batch_axis, own))
        return tensors


def example_of(
    call: str,
    member: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None,
    batch_axes: BatchAxes,
) -> Example:
    """Name the tensors in the arguments, and find their batch axes.

    Args:
        call: The public call, for messages.
        member: A member: the parameters of its ``forward`` are the names.
        args: A tuple of positional arguments, or a single one that is a tensor.
        kwargs: Keyword arguments.
        batch_axes: Of all inputs, or of some by name.

    Raises:
        TypeError: If ``args`` is no tuple.
        ValueError: If there is no such axis or input, or the batches differ in size.
    """
    if isinstance(args, Tensor | PerMember):
        args = (args,)
    if not isinstance(args, tuple):
        raise TypeError(
            f"{call}: args is the tuple of positional arguments of a call ens(*args), or one"
            f" tensor; got {type(args).__name__}: write (x,) for a call ens(x)"
        )
    kwargs = dict(kwargs or {})
    found = _named_tensors(member, args, kwargs)
    _check_names(call, batch_axes, [name for name, _, _ in found])
    problems: list[str] = []
    inputs = []
    for name, tensor, marked in found:
        axis = _axis_of(name, batch_axes)
        own = None if axis is None else _own_axis(name, tensor, marked, axis, problems)
        inputs.append(Input(name, tensor, marked, own))
    example = Example(call, args, kwargs, tuple(inputs))
    sizes = example.batch_sizes
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"`{name}` has {size}" for name, size in sizes.items())
        problems.append(f"the batch axes differ in length: {listed}")
    elif 0 in sizes.values():
        problems.append("the batch has no rows, of which other batches could be made")
    if problems:
        name = found[-1][0]
        raise ValueError(
            f"{call}: {'; '.join(problems)}.\nThe batch axis is axis 0 of every input, counted as"
            f" a member sees it. Say so where it is another one, or where a shape is fixed:\n\n"
            f"    batch_axes={{{name!r}: 1}}     # axis 1 of `{name}`, axis 0 of the others\n"
            f"    batch_axes={{{name!r}: None}}  # the shape of `{name}` is fixed\n"
            f"    batch_axes=None{' ' * max(1, len(name) - 1)}# all shapes are fixed"
        )
    return example


def _named_tensors(
    member: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[str, Tensor, bool]]:
    """Name, tensor and whether it is marked, in the order of the arguments."""
    signature = inspect.signature(member.forward)
    kinds = list(signature.parameters.values())
    names: list[str] = []
    for k in range(len(args)):
        positional = [p for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        rest = next((p.name for p in kinds if p.kind is p.VAR_POSITIONAL), "args")
        names.append(positional[k].name if k < len(positional) else f"{rest}.{k - len(positional)}")
    found = []
    for name, value in [*zip(names, args, strict=True), *kwargs.items()]:
        for path, leaf in leaves(value):
            marked = isinstance(leaf, PerMember)
            inside = leaves(leaf.tree, path) if marked else iter([(path, leaf)])
            found += [(name + dotted(at), t, marked) for at, t in inside if isinstance(t, Tensor)]
    return found


def dotted(path: str) -> str:
    """``['mask'][0].ids`` as ``.mask.0.ids``."""
    return "".join(f".{next(part for part in parts if part)}" for parts in _PART.findall(path))


def _check_names(call: str, batch_axes: BatchAxes, names: list[str]) -> None:
    if not isinstance(batch_axes, Mapping):
        return
    unknown = [
        name
        for name in batch_axes
        if not any(own == name or own.startswith(f"{name}.") for own in names)
    ]
    if unknown:
        raise ValueError(
            f"{call}: batch_axes names {', '.join(map(repr, unknown))}, but the inputs are"
            f" {', '.join(map(repr, names))}"
        )


def _axis_of(name: str, batch_axes: BatchAxes) -> int | None:
    """The axis that was asked for: for the input itself, for what it lies in, or for all."""
    if not isinstance(batch_axes, Mapping):
        return batch_axes
    while name not in batch_axes:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return 0
    return batch_axes[name]


def _own_axis(
    name: str, tensor: Tensor, marked: bool, axis: int, problems: list[str]
) -> int | None:
    """The axis of the tensor itself; None for a tensor without axes."""
    rank = tensor.dim() - marked
    if rank == 0 and axis == 0:
        return None
    if not -rank <= axis < rank:
        seen = tuple(tensor.shape)[marked:]
        problems.append(f"`{name}` has no axis {axis}: a member sees shape {seen}")
        return None
    return axis % rank + marked
