"""Notice what ``forward`` leaves in a module tree, and put the tree back.

Assignments to buffers and plain attributes are seen, and changes of lists, dicts and sets that
are attributes (``self.history.append(h)`` counts as ``self.history = [*self.history, h]``). What
happens deeper inside other objects isn't.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from operator import is_, itemgetter
from typing import Any, Final, Literal, NamedTuple

from torch import nn

from unisono.engine.axis import buffers_of, children_of, parameters_of
from unisono.errors import UnsupportedModelError

Kind = Literal["attribute", "parameter", "buffer", "submodule"]

ABSENT: Final = object()
_MUTABLE: Final = (list, dict, set, deque)
# What nn.Module keeps for itself; no forward assigns it.
BOOKKEEPING: Final = frozenset(nn.Module().__dict__) - {"training"}


class Write(NamedTuple):
    """An assignment that ``forward`` made to a buffer or to a plain attribute of a module."""

    path: str
    key: str
    kind: Kind
    value: Any


class State(NamedTuple):
    """What stood in the tree before a call."""

    values: list[tuple[Any, ...]]
    contents: list[tuple[Any, Any]]  # containers, and copies of them


class Watch:
    """Compares a module tree before and after a call.

    Args:
        modules: The modules of the tree by dotted path.
        attributes: Attributes (path, key) that may hold a container during a call.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], attributes: Collection[tuple[str, str]]
    ) -> None:
        self._attributes = attributes
        # Every dict in which forward can leave something, four per module.
        self._dicts: list[tuple[str, Kind, dict[str, Any]]] = [
            entry
            for path, m in modules.items()
            for entry in (
                (path, "attribute", m.__dict__),
                (path, "parameter", parameters_of(m)),
                (path, "buffer", buffers_of(m)),
                (path, "submodule", children_of(m)),
            )
        ]
        self.look()

    def look(self) -> None:
        """Note which dicts have which keys, so that a call needs no look at the others."""
        self._bare = [d for _, _, d in self._dicts]
        self._sizes = list(map(len, self._bare))
        self._keys: list[tuple[str, ...]] = []
        self._readers: list[tuple[dict[str, Any], Any, bool]] = []
        self._containers: list[tuple[dict[str, Any], str]] = []
        for path, _, d in self._dicts:
            keys = tuple(key for key in d if key not in BOOKKEEPING)
            self._keys.append(keys)
            if keys:
                self._readers.append((d, itemgetter(*keys), len(keys) == 1))
            self._containers += [
                (d, key)
                for key in keys
                if isinstance(d[key], _MUTABLE) or (path, key) in self._attributes
            ]

    def state(self) -> State:
        """What stands in the tree now."""
        contents = [
            (d[key], copy.copy(d[key]))
            for d, key in self._containers
            if isinstance(d[key], _MUTABLE)
        ]
        return State(self._read(), contents)

    def changed(self, before: State) -> bool:
        """Whether anything was assigned, added or deleted since."""
        if list(map(len, self._bare)) != self._sizes:
            return True
        try:
            now = self._read()
        except KeyError:  # one deleted, another added
            return True
        if not all(map(is_, chain.from_iterable(now), chain.from_iterable(before.values))):
            return True
        return any(differ(container, content) for container, content in before.contents)

    def undo(self, before: State) -> list[Write]:
        """Put the tree back; returns what was assigned."""
        writes = []
        replaced = {}  # container -> what it held at the end
        for container, content in before.contents:
            if differ(container, content):
                replaced[id(container)] = copy.copy(container)
                _refill(container, content)
        values = iter(before.values)
        for (path, kind, d), keys in zip(self._dicts, self._keys, strict=True):
            old = dict(zip(keys, next(values), strict=True)) if keys else {}
            for key in {**old, **d}:
                value, kept = d.get(key, ABSENT), old.get(key, ABSENT)
                if key in BOOKKEEPING or (value is kept and id(value) not in replaced):
                    continue
                writes.append(Write(path, key, kind, replaced.get(id(value), value)))
                if kept is ABSENT:
                    del d[key]
                else:
                    d[key] = kept
        return writes

    def _read(self) -> list[tuple[Any, ...]]:
        return [(read(d),) if single else read(d) for d, read, single in self._readers]


def check_write(write: Write) -> None:
    """Refuse assignments that change what the member is made of."""
    if write.kind in ("parameter", "submodule") or write.value is ABSENT:
        name = f"{write.path}.{write.key}" if write.path else write.key
        done = "deletes" if write.value is ABSENT else "assigns"
        raise UnsupportedModelError(
            f"ens(...): forward {done} the {write.kind} `{name}`; run one member once before"
            f" building the ensemble, so that it is there from the start, or make it a buffer"
        )


def _items(container: Any) -> Iterable[Any]:
    return chain.from_iterable(container.items()) if isinstance(container, dict) else container


def differ(container: Any, content: Any) -> bool:
    """Whether a container holds other objects than it did."""
    if len(container) != len(content):
        return True
    if isinstance(container, set):
        return bool(container != content)
    return not all(map(is_, _items(container), _items(content)))


def _refill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list | deque) else container.update)(content)
