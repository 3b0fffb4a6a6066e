"""Walk the tensors inside nested containers: dicts, lists, tuples, named tuples, dataclasses.

torch's own pytree module is private and knows dataclasses only after a global registration,
which a library must not do to types that aren't its own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from types import NoneType
from typing import Any

from torch import Tensor


def tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """The same containers with ``fn(leaf)`` in place of every leaf.

    Args:
        fn: Called once for each leaf, in the order of `leaves`.
        tree: Nested containers; anything that isn't one is a leaf.

    Returns:
        A tree of the same container types. A container in which no leaf changed is returned as
        it is, not copied.
    """
    items = _children(tree)
    if items is None:
        return fn(tree)
    mapped = [(key, tree_map(fn, child)) for key, child in items]
    if all(new is old for (_, new), (_, old) in zip(mapped, items, strict=True)):
        return tree
    return _rebuild(tree, mapped)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path as it would be written in Python: ``[0]['mask'].ids``."""
    items = _children(tree)
    if items is None:
        yield path, tree
        return
    attribute = not isinstance(tree, MutableMapping | list | tuple)
    for key, child in items:
        yield from leaves(child, f"{path}.{key}" if attribute else f"{path}[{key!r}]")


def transpose(trees: Sequence[Any], combine: Callable[[str, list[Any]], Any]) -> Any:
    """One tree from N of the same structure, each leaf ``combine(path, [leaf 0, ...])``.

    Raises:
        ValueError: If the trees differ in structure.
    """
    columns = [list(leaves(tree)) for tree in trees]
    paths = [path for path, _ in columns[0]]
    for i, column in enumerate(columns):
        if [path for path, _ in column] != paths:
            raise ValueError(
                f"member {i} returned {_outline(column)}; member 0 returned {_outline(columns[0])}"
            )
    combined = iter(
        [combine(path, [column[k][1] for column in columns]) for k, path in enumerate(paths)]
    )
    return tree_map(lambda _: next(combined), trees[0])


def _outline(column: list[tuple[str, Any]]) -> str:
    return (
        "{" + ", ".join(f"{path or 'value'}: {type(leaf).__name__}" for path, leaf in column) + "}"
    )


def _children(tree: Any) -> list[tuple[Any, Any]] | None:
    """Keys and values of a container; None for a leaf."""
    if isinstance(tree, Tensor | str | int | float | NoneType):  # by far the most frequent
        return None
    if isinstance(tree, MutableMapping):
        return list(tree.items())
    if isinstance(tree, list | tuple):
        return list(enumerate(tree))
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
    return None


def _rebuild(tree: Any, items: list[tuple[Any, Any]]) -> Any:
    if isinstance(tree, tuple):
        values = [value for _, value in items]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    # A shallow copy keeps what the constructor would not: default factories, extra attributes.
    new = copy.copy(tree)
    for key, value in items:
        if isinstance(new, MutableMapping | list):
            new[key] = value
        else:
            object.__setattr__(new, key, value)  # the way into a frozen dataclass
    return new
