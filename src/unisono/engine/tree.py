"""Walk the tensors inside nested containers, whatever holds them.

Dicts, lists, tuples, sets, deques and slices; types registered with torch as pytree nodes; and
objects (`objects.py`). torch's own pytree module is private and knows other types only after a
global registration, which a library must not do to types that aren't its own.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from operator import is_
from types import NoneType
from typing import Any, Final

from torch import Tensor
from torch.distributions import Distribution

from unisono.engine.objects import (
    attributes_of,
    fit_batch_shape,
    rank_of,
    set_attributes,
    with_all_axes,
)


def tree_map(fn: Callable[[Any], Any], tree: Any) -> Any:
    """The same containers with ``fn(leaf)`` in place of every leaf.

    Args:
        fn: Called once for each leaf, in the order of `leaves`.
        tree: Nested containers; anything that isn't one is a leaf.

    Returns:
        A tree of the same container types. A container in which no leaf changed is returned as
        it is, not copied.
    """
    if isinstance(tree, Tensor):  # by far the most frequent
        return fn(tree)
    return _map(fn, tree, {}, None)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path as it would be written in Python: ``[0]['mask'].ids``."""
    if isinstance(tree, Tensor):
        return iter(((path, tree),))
    return _leaves(tree, path, set())


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


def _map(fn: Callable[[Any], Any], tree: Any, seen: dict[int, Any], rank: int | None) -> Any:
    """`tree_map` with the objects met so far, and the rank of a surrounding distribution."""
    if type(tree) is tuple or type(tree) is list:
        values = [_map(fn, child, seen, rank) for child in tree]
        return tree if all(map(is_, values, tree)) else type(tree)(values)
    items = _children(tree)
    if items is None:
        new = fn(tree)
        return new if rank is None else with_all_axes(new, tree, rank)
    if not isinstance(tree, _PLAIN):
        return _map_object(fn, tree, items, seen, rank)
    mapped = [(key, _map(fn, child, seen, rank)) for key, child in items]
    return tree if _is_same(mapped, items) else _rebuild(tree, mapped)


def _map_object(
    fn: Callable[[Any], Any],
    tree: Any,
    items: list[tuple[Any, Any]],
    seen: dict[int, Any],
    rank: int | None,
) -> Any:
    """Objects may be reached by several ways, also from themselves: each is copied once."""
    if id(tree) in seen:
        return seen[id(tree)][0]
    if (node := _registered(tree)) is not None:
        mapped = [(key, _map(fn, child, seen, rank)) for key, child in items]
        if _is_same(mapped, items):
            return tree
        return node[1]([value for _, value in mapped])
    new = copy.copy(tree)
    seen[id(tree)] = (new, tree)  # the tree, too: its id must not be given to another object
    is_distribution = isinstance(tree, Distribution)
    mapped = [
        (key, _map(fn, child, seen, rank_of(tree, key) if is_distribution else rank))
        for key, child in items
    ]
    if _is_same(mapped, items):
        seen[id(tree)] = (tree, tree)
        return tree
    set_attributes(new, mapped)
    if is_distribution:
        before = [leaf for _, leaf in leaves(dict(items))]
        after = [leaf for _, leaf in leaves(dict(mapped))]
        fit_batch_shape(new, tree.batch_shape, before, after)
    return new


def _is_same(mapped: list[tuple[Any, Any]], items: list[tuple[Any, Any]]) -> bool:
    return all(new is old for (_, new), (_, old) in zip(mapped, items, strict=True))


def _leaves(tree: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    items = _children(tree)
    if items is None:
        yield path, tree
        return
    if not isinstance(tree, _PLAIN):
        if id(tree) in seen:
            return
        seen.add(id(tree))
    attribute = not isinstance(tree, _PLAIN) and _registered(tree) is None
    for key, child in items:
        yield from _leaves(child, f"{path}.{key}" if attribute else f"{path}[{key!r}]", seen)


def _outline(column: list[tuple[str, Any]]) -> str:
    return (
        "{" + ", ".join(f"{path or 'value'}: {type(leaf).__name__}" for path, leaf in column) + "}"
    )


_ATOMS: Final = (Tensor, str, int, float, NoneType)  # by far the most frequent
_PLAIN: Final = (dict, list, tuple, deque, set, frozenset, slice, MutableMapping)


def _children(tree: Any) -> list[tuple[Any, Any]] | None:
    """Keys and values of a container; None for a leaf."""
    if isinstance(tree, _ATOMS):
        return None
    if isinstance(tree, dict):
        return list(tree.items())
    if isinstance(tree, (list, tuple, deque, set, frozenset)):
        return list(enumerate(tree))
    if isinstance(tree, MutableMapping):
        return list(tree.items())
    if isinstance(tree, slice):
        return [("start", tree.start), ("stop", tree.stop), ("step", tree.step)]
    node = _registered(tree)
    return attributes_of(tree) if node is None else list(enumerate(node[0]))


def _registered(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]] | None:
    from unisono.engine.axis import registered_node  # axis.py itself walks trees

    return registered_node(tree)


def _rebuild(tree: Any, items: list[tuple[Any, Any]]) -> Any:
    values = [value for _, value in items]
    if isinstance(tree, tuple):
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    if isinstance(tree, set | frozenset):
        return type(tree)(values)
    if isinstance(tree, slice):
        return slice(*values)
    # A shallow copy keeps what the constructor would not: default factories, extra attributes.
    new = copy.copy(tree)
    for key, value in items:
        new[key] = value
    return new
