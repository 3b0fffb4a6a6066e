"""Containers of tensors, walked in a way that Dynamo can trace."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from unisono.engine.inputs import PerMember
from unisono.engine.objects import attributes_of, set_attributes
from unisono.engine.parts import Call
from unisono.engine.tree import leaves, tree_map


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors in a tree, in order."""
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]


def filled(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """The tree with other tensors, in the order of `tensors_of`."""
    return _map(lambda leaf: next(tensors) if isinstance(leaf, Tensor) else leaf, tree)


def inputs_of(call: Call, fn: Callable[[Tensor], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with ``fn`` applied to the tensors under a mark, and the marks taken off."""

    def of_member(leaf: Any) -> Any:
        return fn(leaf) if isinstance(leaf, Tensor) else leaf

    def unmarked(leaf: Any) -> Any:
        return _map(of_member, leaf.tree) if isinstance(leaf, PerMember) else leaf

    args = tuple([_map(unmarked, arg) for arg in call.args])
    return args, {name: _map(unmarked, arg) for name, arg in call.kwargs.items()}


def _map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """`tree_map` without its questions whether one tuple is another, which Dynamo can't answer."""
    if isinstance(tree, Tensor | PerMember):
        return fn(tree)
    if type(tree) is list:
        return [_map(fn, item) for item in tree]
    if type(tree) is tuple:
        return tuple([_map(fn, item) for item in tree])
    if type(tree) is dict:
        return {key: _map(fn, item) for key, item in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*[_map(fn, item) for item in tree])
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        new = copy.copy(tree)
        set_attributes(new, [(key, _map(fn, item)) for key, item in attributes_of(tree) or []])
        return new
    return tree_map(fn, tree)
