"""Which inputs belong to the members one by one: the `per_member` mark."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final, Generic, TypeVar

from torch import Tensor

from unisono.engine.tree import leaves, tree_map

T = TypeVar("T")

# Objects may hold sizes and names beside their tensors; in dicts and lists they are a mistake.
_ATTRIBUTE: Final = re.compile(r"\.\w+$")


class PerMember(Generic[T]):
    """The mark that `per_member` puts on a tree of tensors."""

    __slots__ = ("tree",)

    def __init__(self, tree: T) -> None:
        self.tree = tree

    def __repr__(self) -> str:
        return f"per_member({self.tree!r})"


def per_member(tree: T) -> PerMember[T]:
    """Mark inputs whose axis 0 is the member: member i sees ``tree[i]``.

    ``ens(per_member(xs))[i] == ens[i](xs[i])``. The mark may stand anywhere in the arguments of
    a call, around one tensor or around nested containers of tensors; what is not marked is
    shared, that is seen whole by every member.

    Args:
        tree: A tensor, or nested containers of tensors and None: dicts, lists, tuples,
            dataclasses, distributions, objects with tensors in their attributes.

    Returns:
        The marked tree, to be passed to an `Ensemble`.

    Shape:
        - every tensor in ``tree``: (N, *) for N members; a member sees (*)

    Example:
        >>> import torch
        >>> from unisono import Ensemble, per_member
        >>> ens = Ensemble([torch.nn.Linear(3, 2) for _ in range(4)])
        >>> ens(per_member(torch.zeros(4, 8, 3))).shape  # a minibatch of 8 for each
        torch.Size([4, 8, 2])
    """
    return PerMember(tree)


def map_inputs(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], fn: Callable[[Tensor], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with ``fn`` applied to the tensors under a mark, and the marks taken off."""

    def unmark(leaf: Any) -> Any:
        if not isinstance(leaf, PerMember):
            return leaf
        if isinstance(leaf.tree, Tensor):
            return fn(leaf.tree)
        return tree_map(lambda t: fn(t) if isinstance(t, Tensor) else t, leaf.tree)

    def taken(arg: Any) -> Any:
        if type(arg) is Tensor:  # by far the most frequent, with a mark or without
            return arg
        return unmark(arg) if type(arg) is PerMember else tree_map(unmark, arg)

    return tuple([taken(arg) for arg in args]), {name: taken(arg) for name, arg in kwargs.items()}


def tensors_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors in the arguments, marked or not."""
    given = [leaf for _, leaf in leaves([args, dict(kwargs)])]
    trees = [leaf.tree if isinstance(leaf, PerMember) else leaf for leaf in given]
    return [leaf for _, leaf in leaves(trees) if isinstance(leaf, Tensor)]


def check_inputs(call: str, n: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise one error that lists every marked leaf without a member axis of length N.

    Args:
        call: The public call, for the message.
        n: Number of members.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Raises:
        ValueError: If a marked leaf is no tensor, or its axis 0 isn't of length N.
    """
    if not kwargs and all(_is_plain(arg, n) for arg in args):
        return
    marked = [
        (path, sub, part)
        for path, leaf in [*leaves(args, "args"), *leaves(dict(kwargs), "kwargs")]
        if isinstance(leaf, PerMember)
        for sub, part in leaves(leaf.tree)
    ]
    problems = []
    for path, sub, part in marked:
        problem = _problem(part, n)
        is_tensor = isinstance(part, Tensor | PerMember)
        if problem is not None and (is_tensor or not _ATTRIBUTE.search(sub)):
            problems.append(f"{path}{sub} {problem}")
    if problems:
        facts = "\n".join(f"  {problem}" for problem in problems)
        raise ValueError(
            f"{call}: axis 0 of what `per_member` marks is the member, and there are {n} members,"
            f" but:\n\n{facts}\n\n"
            f"Stack one input per member, or pass a shared one without the mark:\n\n"
            f"    ens(per_member(torch.stack(inputs)))  # member i sees inputs[i]\n"
            f"    ens(x)                                # every member sees the same x"
        )


def _is_plain(arg: Any, n: int) -> bool:
    """Whether the argument is one tensor, and with a member axis if it is marked."""
    if isinstance(arg, PerMember):
        return isinstance(arg.tree, Tensor) and _problem(arg.tree, n) is None
    return isinstance(arg, Tensor)


def _problem(part: Any, n: int) -> str | None:
    if isinstance(part, PerMember):
        return "is marked twice"
    if isinstance(part, Tensor):
        has_member_axis = part.dim() > 0 and part.shape[0] == n
        return None if has_member_axis else f"has shape {tuple(part.shape)}"
    return None if part is None else f"is of type {type(part).__name__}, not a tensor"
