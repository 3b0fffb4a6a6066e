"""The member's module tree, lent to one call at a time and filled with that call's tensors.

The user's own ``forward`` runs on a template: a copy of the member without tensors. For the time
of a call its parameters and buffers are swapped for the stacked ones. Two calls at once (threads,
or a member that calls the ensemble again) never meet in one template: each borrows its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from unisono.engine.attention import has_attention
from unisono.engine.axis import (
    buffers_of,
    children_of,
    hooks_of,
    is_observed,
    parameters_of,
    trust_flat_weights,
)
from unisono.engine.joining import Rooms
from unisono.engine.leaf import Chain, EncoderForward, SequentialForward, shorten
from unisono.engine.recompute import calls, leave_out_checkpoints
from unisono.engine.tree import leaves
from unisono.engine.watch import Kind, State, Watch, Write, check_write
from unisono.errors import EnsembleError, UnsupportedModelError


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


class Template:
    """One copy of the member's module tree, to be filled for a call.

    Args:
        module: The tree with placeholders for tensors.
        members: The tree that owns the stacked tensors.
        shared: Names of the tensors without a member axis.
        attributes: Plain attributes (path, key) that hold one value per member.
        generation: The state of the pool that the template was made for.
        only_state: What the optimizer keeps, if nobody but it and the library holds the
            parameters; None if others may.
        rooms: Memory that gradients had, which all templates of an ensemble share.
    """

    def __init__(
        self,
        module: nn.Module,
        members: nn.Module,
        shared: Collection[str],
        attributes: Collection[tuple[str, str]],
        *,
        generation: int = 0,
        only_state: Mapping[Tensor, Any] | None = None,
        rooms: Rooms | None = None,
    ) -> None:
        self.module = module
        self.generation = generation
        self.only_state = only_state
        self.rooms = {} if rooms is None else rooms
        modules = dict(module.named_modules())
        trees = dict(members.named_modules())
        self.has_attention = has_attention(module)
        self.slots = _tensor_slots(module, trees, shared)
        self.slots += _alias_slots(modules, self.slots)
        self.slots = [slot._replace(rest=_at_rest(slot.rest)) for slot in self.slots]
        for slot in self.slots:
            slot.container[slot.key] = slot.rest
        for path, key in sorted(attributes):
            home, kept = modules[path].__dict__, trees[path].__dict__
            home[key] = None
            name = _join(path, key)
            self.slots.append(Slot(home, key, None, kept, key, name, "attribute", True))
        self.names = [slot.name for slot in self.slots]
        self.holds_stacked_tensors = all(
            slot.stacked and slot.kind != "attribute" for slot in self.slots
        )
        # Called with the gradients of one member, which there are none of while all run at once.
        self.backward_hooks = [path for path, m in modules.items() if any(hooks_of(m)[2:])]
        self.has_buffers = any(slot.kind == "buffer" for slot in self.slots)
        self.modes = [(m.__dict__, trees[path].__dict__) for path, m in modules.items()]
        for each in modules.values():
            if isinstance(each, nn.RNNBase):
                trust_flat_weights(each)  # its list is filled with the parameters
        shorten(module)
        self.chain = self._only_chain()
        leave_out_checkpoints()
        self._watch = Watch(modules, attributes)

    @property
    def is_training(self) -> bool:
        """Whether any of the member's modules is in train mode."""
        return True in [members["training"] for _, members in self.modes]

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

    @contextmanager
    def lent(self, values: Sequence[Any]) -> Iterator[None]:
        """Put ``values`` into the slots for layers that assign nothing, so nobody has to look."""
        self._put(values)
        try:
            yield
        finally:
            self._clear()

    def _put(self, values: Sequence[Any]) -> None:
        for mine, members in self.modes:
            mine["training"] = members["training"]
        for slot, value in zip(self.slots, values, strict=True):
            slot.container[slot.key] = value

    def _clear(self) -> None:
        for slot in self.slots:
            slot.container[slot.key] = slot.rest

    def _only_chain(self) -> Chain | None:
        """The layers of a member that is one chain, each with stacked tensors alone."""
        forward = vars(self.module).get("forward")
        is_seen = any(hooks_of(self.module)) or not self.holds_stacked_tensors
        if is_seen or not isinstance(forward, SequentialForward | EncoderForward):
            return None
        return forward.chain()

    def look(self) -> None:
        """Take what stands in the tree now for its own, not for something that forward assigned."""
        self._watch.look()

    def keep(self, path: str, key: str, value: Any) -> None:
        """Store a plain attribute that ``forward`` assigned, the same for all members."""
        self.module.get_submodule(path).__dict__[key] = value
        self._watch.look()

    def fill(self, values: Sequence[Any]) -> State:
        """Take over the modes and fill the slots; returns what `empty` compares with."""
        self._put(values)
        return self._watch.state()

    def empty(self, before: State, values: Sequence[Any]) -> list[Write]:
        """Put the template back; returns what was assigned.

        What only refers to parameters is no state: an LSTM makes its flat list of weights anew
        whenever it finds other weights.
        """
        try:
            if not self._watch.changed(before):
                return []
            parameters = {
                id(value)
                for slot, value in zip(self.slots, values, strict=True)
                if slot.kind == "parameter"
            }
            return [w for w in self._watch.undo(before) if not _refers_only(w, parameters)]
        finally:
            self._clear()


class _Filled:
    """The ``with`` block of `Template.filled`."""

    __slots__ = ("_before", "_template", "_values", "_writes")

    def __init__(self, template: Template, values: Sequence[Any]) -> None:
        self._template = template
        self._values = values
        self._writes: list[Write] = []

    def __enter__(self) -> list[Write]:
        self._before = self._template.fill(self._values)
        calls.running += 1
        return self._writes

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        calls.running -= 1
        found = self._template.empty(self._before, self._values)
        if kind is None:
            self._writes += found
            for write in found:
                check_write(write)


class _Resting(Tensor):
    """What stands in a slot between calls: it has a shape, but no op takes it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == "__get__":
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise EnsembleError(
            "ens(...): a part of the member ran after the call, when it has no tensors, as a hook"
            " that forward puts on a tensor does in backward; read what it needs in forward:"
            " weight = self.weight"
        )


def _at_rest(placeholder: Tensor) -> Tensor:
    if is_observed():  # a mode that makes tensors of another class of all that are made
        return placeholder
    resting = placeholder.detach().as_subclass(_Resting)
    resting._is_param = isinstance(placeholder, nn.Parameter)
    return resting


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


def _refers_only(write: Write, parameters: set[int]) -> bool:
    """Whether a plain attribute was given parameters, and no other tensors."""
    if write.kind != "attribute":
        return False
    tensors = [leaf for _, leaf in leaves(write.value) if isinstance(leaf, Tensor)]
    return bool(tensors) and all(id(tensor) in parameters for tensor in tensors)


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
