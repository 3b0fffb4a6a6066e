"""Trees: mapping keeps containers, joining needs one structure."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.engine.tree import leaves, transpose, tree_map

Point = namedtuple("Point", ["x", "y"])


@dataclass(frozen=True)
class Frozen:
    value: Any
    rest: list[Any] = field(default_factory=list)
    late: int = field(init=False, default=7)


trees = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.tuples(inner, inner)
        | st.builds(Point, inner, inner)
        | st.builds(Frozen, inner, st.lists(inner, max_size=2))
        | st.dictionaries(st.integers(), inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(trees)
def test_mapping_changes_leaves_and_nothing_else(tree: Any) -> None:
    mapped = tree_map(lambda leaf: ("mapped", leaf).__hash__(), tree)
    assert [path for path, _ in leaves(mapped)] == [path for path, _ in leaves(tree)]
    assert type(mapped) is (type(tree) if leaves_of(tree) and is_container(tree) else type(mapped))
    assert [leaf for _, leaf in leaves(mapped)] == [
        ("mapped", leaf).__hash__() for _, leaf in leaves(tree)
    ]


def leaves_of(tree: Any) -> list[Any]:
    return [leaf for _, leaf in leaves(tree)]


def is_container(tree: Any) -> bool:
    return isinstance(tree, list | dict | tuple | Frozen)


@given(trees)
def test_a_tree_that_does_not_change_is_not_copied(tree: Any) -> None:
    assert tree_map(lambda leaf: leaf, tree) is tree


@given(trees)
def test_joining_copies_of_a_tree(tree: Any) -> None:
    joined = transpose([tree, tree, tree], lambda path, column: (path, len(column)).__hash__())
    assert leaves_of(joined) == [(path, 3).__hash__() for path, _ in leaves(tree)]


def test_paths_read_as_python() -> None:
    tree = {"a": [1, Point(2, 3)], "b": Frozen({"c": 4}, [5])}
    assert [path for path, _ in leaves(tree)] == [
        "['a'][0]",
        "['a'][1][0]",
        "['a'][1][1]",
        "['b'].value['c']",
        "['b'].rest[0]",
        "['b'].late",
    ]


def test_special_containers_keep_what_their_constructor_would_lose() -> None:
    counts = defaultdict(list, a=1)
    mapped = tree_map(lambda leaf: leaf + 1, counts)
    assert mapped == {"a": 2}
    assert mapped.default_factory is list
    assert tree_map(lambda leaf: leaf + 1, Frozen(1)).late == 8


def test_trees_of_other_structure_are_refused() -> None:
    with pytest.raises(ValueError, match=r"member 1 returned \{\['b'\]: int\}; member 0 returned"):
        transpose([{"a": 1}, {"b": 1}], lambda path, column: column[0])
