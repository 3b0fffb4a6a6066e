"""A call as ``torch.compile`` and ``torch.export`` can trace it.

They can't follow the driver in `call.py`, which nests a level by hand and compares identities. They
do follow ``torch.vmap``, and writes to the dicts of a module, so only these are used here; the rules
hold inside as in `fused`. Nothing is measured: a call runs for all members at once, and member by
member only where ``strategy="loop"`` asks for it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from unisono.engine.axis import (
    at_trace_time,
    buffers_of,
    install,
    parameters_of,
    rules_end,
    rules_start,
    set_native_attention,
)
from unisono.engine.inputs import PerMember
from unisono.engine.objects import attributes_of, set_attributes
from unisono.engine.parts import Call
from unisono.engine.plan import StrategyName
from unisono.engine.pool import Pool
from unisono.engine.rules import BY_MEMBER, RULES
from unisono.engine.tree import leaves, tree_map
from unisono.engine.watch import ABSENT, BOOKKEEPING, Kind, Write, check_write, differ
from unisono.errors import EnsembleError


# A copy of each kind of container that forward may change in place.
_COPIED: Final[Mapping[type, Callable[[Any], Any]]] = {
    list: list,
    dict: dict,
    set: set,
    deque: lambda value: deque(value, value.maxlen),
}


class _Kept(NamedTuple):
    """A plain attribute before a call, and what stands there for the call."""

    value: Any
    own: Any


class _Place(NamedTuple):
    """Where ``forward`` looks up a value, and the value of all members."""

    module: nn.Module  # of the master template, on which forward runs
    path: str
    key: str
    kind: Kind
    value: Any
    stacked: bool


def run_traced(pool: Pool, call: Call, strategy: StrategyName, chunk_size: int | None) -> Any:
    """The outputs of ``call`` for all members; what ``forward`` assigned is stored."""
    _prepare()
    places = list(_places(pool))
    run = _by_member if strategy == "loop" and call.randomness == "different" else _at_once
    # Native attention has no derivative, and the compiler can make more of the ops behind it.
    native = set_native_attention(False)
    # torch.export notes the ops in front of the rules, which could only fix the sizes of a batch.
    rules = strategy != "vmap" and not torch.compiler.is_exporting()
    outputs, writes = run(pool, call, places, rules, chunk_size)
    set_native_attention(native)
    for write in writes:
        _store(pool, write, call.n)
    # A copy of what is the same for all members, so that each can be written to.
    own = [leaf.clone() if _is_repeated(leaf) else leaf for leaf in _tensors(outputs)]
    return _filled(outputs, iter(own))


@at_trace_time
def _prepare() -> bool:
    install(RULES, BY_MEMBER)
    torch.compiler.allow_in_graph([rules_start, rules_end])
    return True


def _at_once(
    pool: Pool, call: Call, places: Sequence[_Place], rules: bool, chunk_size: int | None
) -> tuple[Any, list[Write]]:
    """``torch.vmap`` over the member's forward."""
    trees: list[Any] = []  # what the one run gave, its tensors replaced by those of all members

    def run(stacked: list[Tensor], marked: list[Tensor], counter: Tensor) -> list[Tensor]:
        if rules:
            rules_start(counter_size, call.randomness)
        tree = _run_member(pool, call, places, iter(stacked), iter(marked))
        if rules:
            rules_end()
        trees.append(tree)
        return _tensors(tree)

    stacked = [leaf for place in places if place.stacked for leaf in _tensors(place.value)]
    marked: list[Tensor] = []
    _inputs(call, marked.append)
    counter = torch.empty(call.n)  # an axis also for a call without any stacked tensor
    counter_size = call.n
    mapped = torch.vmap(run, randomness=call.randomness, chunk_size=chunk_size)
    results = mapped(stacked, marked, counter)
    return _filled(trees[0], iter(results))


def _by_member(
    pool: Pool, call: Call, places: Sequence[_Place], rules: bool, chunk_size: int | None
) -> tuple[Any, list[Write]]:
    """The members one after another."""
    stacked = [
        leaf.unbind() for place in places if place.stacked for leaf in _tensors(place.value)
    ]
    marked: list[Sequence[Tensor]] = []
    _inputs(call, lambda tensor: marked.append(tensor.unbind()))
    trees = [
        _run_member(
            pool, call, places, iter([s[i] for s in stacked]), iter([m[i] for m in marked])
        )
        for i in range(call.n)
    ]
    columns = zip(*[_tensors(tree) for tree in trees], strict=True)
    return _filled(trees[0], iter([torch.stack(column) for column in columns]))


def _run_member(
    pool: Pool,
    call: Call,
    places: Sequence[_Place],
    stacked: Iterator[Tensor],
    marked: Iterator[Tensor],
) -> tuple[Any, list[Write]]:
    """Call ``fn`` on the template with the tensors of one member; what it gave, and assigned."""
    modules = dict(pool.module.named_modules())
    given = [_filled(p.value, stacked) if p.stacked else p.value for p in places]
    rest = [_swap(place, value) for place, value in zip(places, given, strict=True)]
    before = {path: _attributes(module) for path, module in modules.items()}
    args, kwargs = _inputs(call, lambda _: next(marked))
    outputs = call.fn(pool.module, *args, **kwargs)
    writes = []
    for path, module in modules.items():
        writes += _undo(path, module, before[path])
    for place, value, old in zip(places, given, rest, strict=True):
        now = _swap(place, old)
        if place.kind != "attribute" and now is not value:
            writes.append(Write(place.path, place.key, place.kind, now))
    return outputs, writes


def _places(pool: Pool) -> Iterator[_Place]:
    trees = dict(pool.members.named_modules())
    for path, module in pool.module.named_modules():
        tree = trees[path]
        if module.training != tree.training:
            module.training = tree.training
        for key, parameter in parameters_of(tree).items():
            if parameter is not None:
                stacked = _join(path, key) not in pool.shared
                yield _Place(module, path, key, "parameter", parameter, stacked)
        for key, buffer in buffers_of(tree).items():
            if buffer is not None:
                stacked = _join(path, key) not in pool.shared
                yield _Place(module, path, key, "buffer", buffer, stacked)
        for owner, key in sorted(pool.attributes):
            if owner == path:
                yield _Place(module, path, key, "attribute", getattr(tree, key), True)


def _swap(place: _Place, value: Any) -> Any:
    """Put a value in its place; returns what stood there."""
    if place.kind == "attribute":
        old = vars(place.module).get(place.key, ABSENT)
        if value is ABSENT:
            delattr(place.module, place.key)
        else:
            setattr(place.module, place.key, value)
        return old
    home: dict[str, Any] = (parameters_of if place.kind == "parameter" else buffers_of)(place.module)
    old = home[place.key]
    home[place.key] = value
    return old


def _attributes(module: nn.Module) -> dict[str, _Kept]:
    """The module's plain attributes; containers make room for copies, which may be changed."""
    kept = {}
    for key, value in list(vars(module).items()):
        if key not in BOOKKEEPING:
            own = value
            if type(value) in _COPIED:
                own = _COPIED[type(value)](value)
                setattr(module, key, own)
            kept[key] = _Kept(value, own)
    return kept


def _undo(path: str, module: nn.Module, before: dict[str, _Kept]) -> list[Write]:
    """Put the plain attributes back; returns what was assigned."""
    writes = []
    for key, value in list(vars(module).items()):
        if key in BOOKKEEPING:
            continue
        if key not in before:
            writes.append(Write(path, key, "attribute", value))
            delattr(module, key)
            continue
        kept = before[key]
        if value is not kept.own or (value is not kept.value and differ(value, kept.value)):
            writes.append(Write(path, key, "attribute", value))
        if value is not kept.value:
            setattr(module, key, kept.value)
    if any(key not in vars(module) for key in before):
        missing = next(key for key in before if key not in vars(module))
        check_write(Write(path, missing, "attribute", ABSENT))
    return writes


def _store(pool: Pool, write: Write, n: int) -> None:
    """Keep what ``forward`` assigned where the next call will find it."""
    check_write(write)
    path, key, kind, value = write
    tree = pool.members.get_submodule(path)
    if kind == "buffer":
        shared = isinstance(value, Tensor) and _join(path, key) in pool.shared
        buffers_of(tree)[key] = _one_for_all(_join(path, key), value, n) if shared else value
    elif (path, key) in pool.attributes or key == "training":
        setattr(tree, key, value)
    elif _tensors(value):
        setattr(tree, key, value)
        pool.add_attribute(path, key)
    else:
        setattr(pool.module.get_submodule(path), key, value)
        pool.renew()


def _one_for_all(name: str, value: Tensor, n: int) -> Tensor:
    """The value without a member axis, of a buffer that is kept once."""
    if n > 1 and not _is_repeated(value):
        raise EnsembleError(
            f"ens(...): the buffer `{name}` is kept once for all members (shared=), but forward"
            f" assigns another value for each; leave it out of shared="
        )
    return value[0]


def _is_repeated(value: Tensor) -> bool:
    """Whether a result is the same for all members, so that vmap only repeated it."""
    return value.stride(0) == 0


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]


def _filled(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """The tree with other tensors, in the order of `_tensors`."""
    return _map(lambda leaf: next(tensors) if isinstance(leaf, Tensor) else leaf, tree)


def _inputs(call: Call, fn: Callable[[Tensor], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
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


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
