"""The member's module tree, lent to one call at a time and filled with that call's tensors.

The user's own ``forward`` runs on a template: a copy of the member without tensors. For the time
of a call its parameters and buffers are swapped for the stacked ones. Two calls at once (threads,
or a member that calls the ensemble again) never meet in one template: each borrows its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from unisono.engine.axis import buffers_of, children_of, parameters_of
from unisono.errors import UnsupportedModelError

Kind = Literal["attribute", "parameter", "buffer", "submodule"]

_KINDS: tuple[Kind, ...] = ("attribute", "parameter", "buffer", "submodule")
_ABSENT = object()
# What nn.Module keeps for itself; no forward assigns it.
_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"}


class Slot(NamedTuple):
    """A place where ``forward`` looks up a tensor, and where the ensemble keeps it."""

    container: Any  # a dict of the template's module, or a list that refers to the same tensor
    key: Any
    rest: Any  # what stands there between calls
    source: dict[str, Any]  # a dict of the member tree's module
    source_key: str
    name: str  # dotted name, as in the member's state dict
    kind: Kind
    stacked: bool  # False: one tensor for all members


class Write(NamedTuple):
    """An assignment that ``forward`` made to a buffer or to a plain attribute of a module."""

    path: str
    key: str
    kind: Kind
    value: Any


class Template:
    """One copy of the member's module tree, to be filled for a call.

    Args:
        module: The tree with placeholders for tensors.
        members: The tree that owns the stacked tensors.
        shared: Names of the tensors without a member axis.
        attributes: Plain attributes (path, key) that hold one value per member.
        generation: The state of the pool that the template was made for.
    """

    def __init__(
        self,
        module: nn.Module,
        members: nn.Module,
        shared: Collection[str],
        attributes: Collection[tuple[str, str]],
        *,
        generation: int = 0,
    ) -> None:
        self.module = module
        self.generation = generation
        modules = dict(module.named_modules())
        trees = dict(members.named_modules())
        self.slots = _tensor_slots(module, trees, shared)
        self.slots += _alias_slots(modules, self.slots)
        for path, key in sorted(attributes):
            home, kept = modules[path].__dict__, trees[path].__dict__
            home[key] = None
            name = _join(path, key)
            self.slots.append(Slot(home, key, None, kept, key, name, "attribute", True))
        self._modes = [(m.__dict__, trees[path].__dict__) for path, m in modules.items()]
        # Every dict in which forward can leave something: four per module, in the order of _KINDS.
        self._paths = list(modules)
        self._dicts: list[dict[str, Any]] = [
            d
            for m in modules.values()
            for d in (m.__dict__, parameters_of(m), buffers_of(m), children_of(m))
        ]
        self._look()

    @property
    def is_training(self) -> bool:
        """Whether any of the member's modules is in train mode."""
        return any(members["training"] for _, members in self._modes)

    def values(self) -> list[Any]:
        """The ensemble's tensors (or trees of them), one for each slot."""
        return [slot.source[slot.source_key] for slot in self.slots]

    def filled(self, values: Sequence[Any]) -> _Filled:
        """Put ``values`` into the slots for the time of a ``with`` block.

        ``with template.filled(values) as writes`` gives a list that holds, once the block has
        ended well, what ``forward`` assigned. The template itself is afterwards as before, also
        after an exception.
        """
        return _Filled(self, values)

    def keep(self, path: str, key: str, value: Any) -> None:
        """Store a plain attribute that ``forward`` assigned, the same for all members."""
        self.module.get_submodule(path).__dict__[key] = value
        self._look()

    def _look(self) -> None:
        """Note which dicts have which keys, so that `watched` can be fast."""
        self._sizes = list(map(len, self._dicts))
        self._watched = [
            (number, itemgetter(*keys), keys)
            for number, d in enumerate(self._dicts)
            if (keys := tuple(key for key in d if key not in _BOOKKEEPING))
        ]

    def fill(self, values: Sequence[Any]) -> list[Any]:
        """Fill the slots and return the state that `changed` compares with."""
        for mine, members in self._modes:
            mine["training"] = members["training"]
        for slot, value in zip(self.slots, values, strict=True):
            slot.container[slot.key] = value
        return self._state()

    def empty(self) -> None:
        """Put back what stands in the slots between calls."""
        for slot in self.slots:
            slot.container[slot.key] = slot.rest

    def changed(self, before: list[Any]) -> bool:
        """Whether anything was assigned, added or deleted."""
        if list(map(len, self._dicts)) != self._sizes:
            return True
        try:
            return not all(
                map(is_, chain.from_iterable(self._state()), chain.from_iterable(before))
            )
        except KeyError:  # one deleted, another added
            return True

    def undo(self, before: list[Any]) -> list[Write]:
        """Put the dicts back; returns what was assigned."""
        writes: list[Write] = []
        watched = {
            number: (keys, old)
            for (number, _, keys), old in zip(self._watched, before, strict=True)
        }
        for number, d in enumerate(self._dicts):
            keys, values = watched.get(number, ((), ()))
            old = dict(zip(keys, values, strict=True))
            path, kind = self._paths[number // len(_KINDS)], _KINDS[number % len(_KINDS)]
            for key in {**old, **d}:
                value = d.get(key, _ABSENT)
                if key not in _BOOKKEEPING and value is not old.get(key, _ABSENT):
                    writes.append(Write(path, key, kind, value))
                    if key in old:
                        d[key] = old[key]
                    else:
                        del d[key]
        return writes

    def _state(self) -> list[Any]:
        dicts = self._dicts
        return [
            get(dicts[number]) if len(keys) > 1 else (get(dicts[number]),)
            for number, get, keys in self._watched
        ]


class _Filled:
    """The ``with`` block of `Template.filled`."""

    __slots__ = ("_before", "_template", "_values", "_writes")

    def __init__(self, template: Template, values: Sequence[Any]) -> None:
        self._template = template
        self._values = values
        self._writes: list[Write] = []

    def __enter__(self) -> list[Write]:
        self._before = self._template.fill(self._values)
        return self._writes

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        template = self._template
        try:
            if template.changed(self._before):
                found = template.undo(self._before)
                if kind is None:
                    self._writes += found
        finally:
            template.empty()
        for write in self._writes:
            _check_write(write)


def _tensor_slots(
    module: nn.Module, trees: Mapping[str, nn.Module], shared: Collection[str]
) -> list[Slot]:
    slots = []
    for path, owner in module.named_modules():
        tree = trees[path]
        homes: list[tuple[Any, Any, Kind]] = [
            (parameters_of(owner), parameters_of(tree), "parameter"),
            (buffers_of(owner), buffers_of(tree), "buffer"),
        ]
        for home, source, kind in homes:
            for key, rest in home.items():
                if rest is not None:
                    name = _join(path, key)
                    stacked = name not in shared
                    slots.append(Slot(home, key, rest, source, key, name, kind, stacked))
    return slots


def _alias_slots(modules: Mapping[str, nn.Module], slots: Sequence[Slot]) -> list[Slot]:
    """Slots for other references to the same tensors, such as an LSTM's list of flat weights."""
    of_placeholder = {id(slot.rest): slot for slot in slots}
    aliases: list[Slot] = []
    seen: set[int] = set()

    def visit(container: Any, path: str) -> None:
        if id(container) in seen:
            return
        seen.add(id(container))
        is_tuple = isinstance(container, tuple | set | frozenset)
        items = container.items() if isinstance(container, dict) else enumerate(container)
        for key, value in items:
            slot = of_placeholder.get(id(value))
            if slot is not None and is_tuple:
                raise UnsupportedModelError(
                    f"Ensemble: `{path}` is a {type(container).__name__} that holds the tensor"
                    f" `{slot.name}`, which can't be exchanged there; use a list, or look the"
                    f" tensor up in forward"
                )
            if slot is not None:
                aliases.append(slot._replace(container=container, key=key, kind="attribute"))
            elif isinstance(value, dict | list | tuple | set | frozenset):
                visit(value, path)
            elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type):
                visit(value.__dict__, path)

    for path, module in modules.items():
        seen.update(map(id, (parameters_of(module), buffers_of(module), children_of(module))))
        for key, value in list(module.__dict__.items()):
            slot = of_placeholder.get(id(value))
            if slot is not None:
                aliases.append(slot._replace(container=module.__dict__, key=key, kind="attribute"))
            elif isinstance(value, dict | list | tuple | set | frozenset):
                visit(value, _join(path, key))
            elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type):
                visit(value.__dict__, _join(path, key))
    return aliases


def _check_write(write: Write) -> None:
    if write.kind in ("parameter", "submodule") or write.value is _ABSENT:
        name = _join(write.path, write.key)
        done = "deletes" if write.value is _ABSENT else "assigns"
        raise UnsupportedModelError(
            f"Ensemble: forward {done} the {write.kind} `{name}`; run one member once before"
            f" building the ensemble, so that it is there from the start, or make it a buffer"
        )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
