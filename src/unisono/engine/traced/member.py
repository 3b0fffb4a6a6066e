"""One run of ``forward`` on the master template, as Dynamo can trace it.

What `template.py` and `watch.py` do for a call, without asking for identities of containers, and
without slots that are looked up beforehand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from unisono.engine.axis import FLAT_WEIGHTS, buffers_of, parameters_of
from unisono.engine.parts import Call
from unisono.engine.pool import Pool
from unisono.engine.traced.tree import filled, inputs_of, tensors_of
from unisono.engine.watch import ABSENT, BOOKKEEPING, Kind, Write, check_write, differ
from unisono.errors import EnsembleError

# A copy of each kind of container that forward may change in place.
_COPIED: Final[Mapping[type, Callable[[Any], Any]]] = {
    list: list,
    dict: dict,
    set: set,
    deque: lambda value: deque(value, value.maxlen),
}


class Place(NamedTuple):
    """Where ``forward`` looks up a value, and the value of all members."""

    module: nn.Module  # of the master template, on which forward runs
    path: str
    key: str
    kind: Kind
    value: Any
    stacked: bool


class _Kept(NamedTuple):
    """A plain attribute before a call, and what stands there for the call."""

    value: Any
    own: Any


def places_of(pool: Pool) -> Iterator[Place]:
    """Every place of the ensemble's tensors; the modes are taken over."""
    trees = dict(pool.members.named_modules())
    for path, module in pool.module.named_modules():
        tree = trees[path]
        if module.training != tree.training:
            module.training = tree.training
        for key, parameter in parameters_of(tree).items():
            if parameter is not None:
                stacked = _join(path, key) not in pool.shared
                yield Place(module, path, key, "parameter", parameter, stacked)
        for key, buffer in buffers_of(tree).items():
            if buffer is not None:
                stacked = _join(path, key) not in pool.shared
                yield Place(module, path, key, "buffer", buffer, stacked)
        for owner, key in sorted(pool.attributes):
            if owner == path:
                yield Place(module, path, key, "attribute", getattr(tree, key), True)


def run_member(
    pool: Pool,
    call: Call,
    places: Sequence[Place],
    stacked: Iterator[Tensor],
    marked: Iterator[Tensor],
) -> tuple[Any, list[Write]]:
    """Call ``fn`` on the template with the tensors of one member; what it gave, and assigned.

    Args:
        pool: The pool of the ensemble.
        call: What to run.
        places: Where forward looks up what.
        stacked: The member's part of each stacked tensor.
        marked: The member's part of each tensor that was marked with `per_member`.
    """
    modules = dict(pool.module.named_modules())
    given = [filled(p.value, stacked) if p.stacked else p.value for p in places]
    rest = [_swap(place, value) for place, value in zip(places, given, strict=True)]
    before = {path: _attributes(module) for path, module in modules.items()}
    args, kwargs = inputs_of(call, lambda _: next(marked))
    writes = []
    try:
        outputs = call.fn(pool.module, *args, **kwargs)
    finally:  # torch.export runs all this
        for path, module in modules.items():
            writes += _undo(path, module, before[path])
        for place, value, old in zip(places, given, rest, strict=True):
            now = _swap(place, old)
            if place.kind != "attribute" and now is not value:
                writes.append(Write(place.path, place.key, place.kind, now))
    return outputs, writes


def keep(pool: Pool, write: Write, n: int) -> None:
    """Keep what ``forward`` assigned where the next call will find it."""
    check_write(write)
    path, key, kind, value = write
    tree = pool.members.get_submodule(path)
    if kind == "buffer":
        shared = isinstance(value, Tensor) and _join(path, key) in pool.shared
        buffers_of(tree)[key] = _one_for_all(_join(path, key), value, n) if shared else value
    elif (path, key) in pool.attributes or key == "training":
        setattr(tree, key, value)
    elif tensors_of(value):
        setattr(tree, key, value)
        pool.add_attribute(path, key)
    else:
        setattr(pool.module.get_submodule(path), key, value)
        pool.renew()


def _one_for_all(name: str, value: Tensor, n: int) -> Tensor:
    """The value without a member axis, of a buffer that is kept once."""
    if n > 1 and value.stride(0) != 0:  # else vmap only repeated it
        raise EnsembleError(
            f"ens(...): the buffer `{name}` is kept once for all members (shared=), but forward"
            f" assigns another value for each; leave it out of shared="
        )
    return value[0]


def _swap(place: Place, value: Any) -> Any:
    """Put a value in its place; returns what stood there."""
    if place.kind == "attribute":
        old = vars(place.module).get(place.key, ABSENT)
        if value is ABSENT:
            delattr(place.module, place.key)
        else:
            setattr(place.module, place.key, value)
        return old
    own = parameters_of if place.kind == "parameter" else buffers_of
    home: dict[str, Any] = own(place.module)
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
        is_changed = value is not kept.own or (
            value is not kept.value and differ(value, kept.value)
        )
        # A recurrent layer's list of its weights is no state, but the parameters of this call.
        if is_changed and not (isinstance(module, nn.RNNBase) and key in FLAT_WEIGHTS):
            writes.append(Write(path, key, "attribute", value))
        if value is not kept.value:
            setattr(module, key, kept.value)
    if any(key not in vars(module) for key in before):
        missing = next(key for key in before if key not in vars(module))
        check_write(Write(path, missing, "attribute", ABSENT))
    return writes


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
