"""Compare what two members hold: numbers, containers, functions, objects, plain tensors.

Two values are equal if a copy of one would do what a copy of the other does, so an object is
compared by what `copy.deepcopy` carries over. Modules and tensors that a member registers are
compared by *where*: `[self.fc.weight]` in one member equals `[self.fc.weight]` in another.
"""

from __future__ import annotations

import functools
import random
import types
import weakref
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from unisono.copies import UNREADABLE, carried
from unisono.describe import ATOMS, NOTHING, contrast, describe, describe_place
from unisono.errors import Difference

# What a generator draws differs between members by design, and a handle holds a number counted
# over the whole process; neither is architecture. Modules' hooks are compared, behind the handle.
_NOT_ARCHITECTURE = (
    *(torch.Generator, np.random.Generator, np.random.RandomState, np.random.BitGenerator),
    *(random.Random, RemovableHandle),
)
_CLASS_NOISE = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__annotations__", "_abc_impl", "__slotnames__"}
)
_COMPILED = "_torchdynamo_orig_callable"  # torch 2.13; without it, compiled functions differ
_BY_IDENTITY: Any = object.__eq__

Items = Mapping[Any, Any]


class Comparison(ABC):
    """One member beside member 0: collects `differences`, and what functions hold of the member.

    Args:
        member: Index of the member.
        own: Where the member registers what it owns: id of a module or tensor -> dotted path.
        reference: The same of member 0.
    """

    def __init__(self, member: int, own: Mapping[int, str], reference: Mapping[int, str]) -> None:
        self.member = member
        self.own = own
        self.reference = reference
        self.differences: dict[Difference, None] = {}  # an ordered set: one fact, reported once
        self.captures: dict[str, str] = {}
        self._seen: dict[tuple[int, int, bool], object] = {}
        self._in_class = False

    def report(self, path: str, found: str, expected: str) -> None:
        """Record that the member has `found` where member 0 has `expected`."""
        self.differences[Difference(self.member, path or "(the model)", found, expected)] = None

    def visit(self, a: Any, b: Any, path: str, within: bool = False) -> None:
        """Record every difference between the member's value `a` and member 0's value `b`.

        Args:
            a: The member's value.
            b: Member 0's value.
            path: Where they are.
            within: Whether a function holds them. Copying a module copies no functions, so what a
                function holds of its member is the same object in every copy.
        """
        kind = type(b)
        if kind in ATOMS and type(a) is kind:
            if a is not b and a != b and (a == a or b == b):  # NaN equals NaN
                self.report(path, *contrast(a, b))
        elif isinstance(b, (nn.Module, Tensor)) and isinstance(a, (nn.Module, Tensor)):
            self._visit_owned(a, b, path, within)
        elif isinstance(a, type) and isinstance(b, type):
            if not self.same_class(a, b):
                self.report(path, *contrast(a, b))
        elif not self.same_class(type(a), kind):
            self.report(path, *contrast(a, b))
        elif (id(a), id(b), within) not in self._seen:
            self._seen[id(a), id(b), within] = (a, b)  # alive, or another could get its id
            for kinds, compare in _BY_KIND:
                if isinstance(b, kinds):
                    compare(self, a, b, path, within)
                    if kinds in _CONTAINERS and hasattr(b, "__dict__"):
                        self.visit_items(vars(a), vars(b), path, ".{}", within)
                    return
            self._visit_object(a, b, path, within)

    def visit_items(self, a: Items, b: Items, path: str, step: str, within: bool = False) -> None:
        """Compare two mappings key by key; `step` leads from `path` to the value of a key."""
        for key, y in b.items():
            if key not in a:
                self.report(path + step.format(key), "missing", describe(y))
            elif not ((x := a[key]) is y and type(y) in ATOMS):
                self.visit(x, y, path + step.format(key), within)
        for key, x in a.items():
            if key not in b:
                self.report(path + step.format(key), describe(x), NOTHING)

    @abstractmethod
    def visit_modules(self, a: nn.Module, b: nn.Module, path: str, within: bool) -> None:
        """Compare two modules that no member registers, such as those in a plain list."""

    @abstractmethod
    def visit_tensors(self, a: Tensor, b: Tensor, path: str) -> None:
        """Compare two tensors that no member registers."""

    def equal(self, a: Any, b: Any, path: str, within: bool) -> bool:
        """Return whether `visit` would find no difference."""
        trial = self._trial(a, b, path, within)
        self.captures.update(trial.captures)
        return not trial.differences

    def _trial(
        self, a: Any, b: Any, path: str, within: bool, *, in_class: bool = False
    ) -> Comparison:
        trial = type(self)(self.member, self.own, self.reference)
        trial._seen = self._seen.copy()
        trial._in_class = self._in_class or in_class
        trial.visit(a, b, path, within)
        return trial

    def same_class(self, a: type, b: type) -> bool:
        """Return whether two classes are one, or copies by name, bases and body.

        torch makes a class of its own for each parametrised or traced module.
        """
        if a is b or (id(a), id(b), False) in self._seen:
            return True
        if (a.__module__, a.__qualname__) != (b.__module__, b.__qualname__):
            return False
        if len(a.__bases__) != len(b.__bases__):
            return False
        self._seen[id(a), id(b), False] = (a, b)
        x, y = ({k: v for k, v in vars(c).items() if k not in _CLASS_NOISE} for c in (a, b))
        if all(map(self.same_class, a.__bases__, b.__bases__)):
            if not self._trial(x, y, "", False, in_class=True).differences:
                return True
        del self._seen[id(a), id(b), False]
        return False

    def _visit_owned(self, a: Any, b: Any, path: str, within: bool) -> None:
        """Compare modules or tensors: by place if a member registers them, else by content."""
        if self._in_class and isinstance(a, nn.Module) and isinstance(b, nn.Module):
            # A parametrised class holds the module that it was made for, as the key of a cache;
            # in a copy of that module it still holds the first. Either way it's not the member's.
            if type(a).__qualname__ != type(b).__qualname__:
                self.report(path, *contrast(type(a), type(b)))
            return
        at, expected = self.own.get(id(a)), self.reference.get(id(b))
        if within and at is not None:
            self.captures.setdefault(path, describe_place(a, at, ""))
        if at is not None or expected is not None:
            if at != expected:
                self.report(path, describe_place(a, at, path), describe_place(b, expected, path))
        elif isinstance(a, Tensor) and isinstance(b, Tensor):
            self.visit_tensors(a, b, path)
        elif isinstance(a, Tensor) or isinstance(b, Tensor):
            self.report(path, *contrast(a, b))
        elif (id(a), id(b), within) not in self._seen:
            self._seen[id(a), id(b), within] = (a, b)
            self.visit_modules(a, b, path, within)

    def _visit_function(self, a: Any, b: Any, path: str, _: bool) -> None:
        if hasattr(a, _COMPILED) and hasattr(b, _COMPILED):  # what torch.compile adds tells nothing
            self.visit(getattr(a, _COMPILED), getattr(b, _COMPILED), path, True)
            return
        if a.__code__ != b.__code__:
            self.report(path, *contrast(a, b))
            return
        for name in ("__defaults__", "__kwdefaults__"):
            self.visit(getattr(a, name), getattr(b, name), f"{path}.{name}", True)
        names = a.__code__.co_freevars
        for name, x, y in zip(names, a.__closure__ or (), b.__closure__ or (), strict=True):
            self.visit(_content(x), _content(y), f"{path} (closure {name})", True)
        if a is not b:
            self.visit_items(vars(a), vars(b), path, ".{}", True)

    def _visit_builtin(self, a: Any, b: Any, path: str, _: bool) -> None:
        self.visit(a.__name__, b.__name__, f"{path}.__name__")
        self.visit(a.__self__, b.__self__, f"{path}.__self__", True)

    def _visit_parts(self, a: Any, b: Any, path: str, within: bool) -> None:
        names = next(names for kind, names in _PARTS.items() if isinstance(b, kind))
        for name in names:
            self.visit(getattr(a, name), getattr(b, name), f"{path}.{name}", within)

    def _visit_reference(self, a: Any, b: Any, path: str, _: bool) -> None:
        self.visit(a(), b(), f"{path}()", True)  # not copied either, like a function

    def _visit_sequence(self, a: Any, b: Any, path: str, within: bool) -> None:
        if len(a) != len(b):
            self.report(path, *contrast(a, b))
            return
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if not (x is y and type(y) in ATOMS):
                self.visit(x, y, f"{path}[{i}]", within)

    def _visit_mapping(self, a: Any, b: Any, path: str, within: bool) -> None:
        if a.keys() != b.keys() and not all(isinstance(k, (str, int)) for k in (*a, *b)):
            # Keys such as modules are equal only to themselves: compare them by content.
            self.visit(list(a.items()), list(b.items()), path, within)
            return
        self.visit_items(a, b, path, "[{!r}]", within)
        if a.keys() == b.keys() and any(map(_differ, a, b)):  # a loop over it takes another order
            self.report(path, *contrast(tuple(a), tuple(b), note="keys in order "))
        if isinstance(b, defaultdict):
            self.visit(a.default_factory, b.default_factory, f"{path}.default_factory", within)

    def _visit_set(self, a: Any, b: Any, path: str, within: bool) -> None:
        left, right = [x for x in a if x not in b], [y for y in b if y not in a]
        atoms = any(type(x) in ATOMS for x in (*left, *right))
        while right and not atoms:  # such as modules, equal only to themselves: pair by content
            y = right.pop()
            partner = next((i for i, x in enumerate(left) if self.equal(x, y, path, within)), None)
            if partner is None:
                self.report(path, *contrast(a, b))
                return
            del left[partner]
        if left or right:
            self.report(path, *contrast(a, b))

    def _visit_array(self, a: Any, b: Any, path: str, within: bool) -> None:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            self.report(path, *(f"array of shape {v.shape}, dtype {v.dtype}" for v in (a, b)))
        elif a.dtype.hasobject:
            self.visit(a.tolist(), b.tolist(), path, within)
        elif a is not b and a.tobytes() != b.tobytes():
            for index in np.argwhere((a != b) & ~((a != a) & (b != b)))[:1]:
                at = tuple(index.tolist())
                self.report(path, f"array, values differ, first at {at}: {a[at]}", str(b[at]))

    def _visit_object(self, a: Any, b: Any, path: str, within: bool) -> None:
        if a is b or isinstance(b, _NOT_ARCHITECTURE):
            return
        x, y = carried(a), carried(b)
        if x is UNREADABLE or y is UNREADABLE:
            # A lock or a stream: of one type, and with nothing to tell them apart but `==`.
            if type(b).__eq__ is not _BY_IDENTITY and _differ(a, b):
                self.report(path, *contrast(a, b))
        elif isinstance(x, dict) and isinstance(y, dict):
            self.visit_items(x, y, path, ".{}", within)
        elif not self.equal(x, y, path, within):
            self.report(path, *contrast(a, b))


_PARTS: dict[type, tuple[str, ...]] = {
    functools.partial: ("func", "args", "keywords"),
    types.MethodType: ("__func__", "__self__"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset", "fdel"),
    types.ModuleType: ("__name__",),
}
_CONTAINERS: tuple[Any, ...] = ((list, tuple), dict, (set, frozenset))
_BY_KIND: tuple[tuple[Any, Callable[[Comparison, Any, Any, str, bool], None]], ...] = (
    (_CONTAINERS[0], Comparison._visit_sequence),
    (_CONTAINERS[1], Comparison._visit_mapping),
    (_CONTAINERS[2], Comparison._visit_set),
    (types.FunctionType, Comparison._visit_function),
    (types.BuiltinFunctionType, Comparison._visit_builtin),
    (tuple(_PARTS), Comparison._visit_parts),
    (weakref.ReferenceType, Comparison._visit_reference),
    (np.ndarray, Comparison._visit_array),
)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _differ(a: object, b: object) -> bool:
    try:
        return bool(a != b)
    except Exception:  # arrays have no single truth value
        return a is not b
