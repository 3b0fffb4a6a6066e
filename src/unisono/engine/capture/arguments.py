"""The arguments of a captured call: tensors, and everything else, which has to be equal."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import Tensor, nn

from unisono.engine.capture.recording import PLAIN
from unisono.engine.inputs import PerMember
from unisono.engine.tree import leaves, tree_map
from unisono.errors import UnsupportedModelError

Form = tuple[Any, ...]
"""What has to be equal between two calls, besides the shapes and dtypes of tensors."""

_SHARED: Final[Form] = ("args[0]", Tensor)
_MARKED: Final[Form] = ("args[0]", PerMember)
_ONE_SHARED: Final[Form] = (_SHARED,)
_ONE_MARKED: Final[Form] = (_MARKED,)


class Fixed:
    """A leaf that isn't a tensor."""

    __slots__ = ("kind", "value")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Any) -> None:
        self.kind = type(value)
        self.value = value

    def __eq__(self, other: object) -> bool:
        """Equal in type and value; for what can't be compared, the very same object."""
        if not isinstance(other, Fixed) or self.kind is not other.kind:
            return False
        try:
            return self.value is other.value or bool(self.value == other.value)
        except (TypeError, ValueError, RuntimeError):
            return False


def outline(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Form, Sequence[Tensor]]:
    """The form of a call and its tensors, without the marks."""
    if len(args) == 1 and not kwargs:  # by far the most frequent, and every microsecond counts
        arg = args[0]
        kind = type(arg)
        if kind is Tensor:
            return _ONE_SHARED, args
        if kind is PerMember and type(arg.tree) is Tensor:
            return _ONE_MARKED, (arg.tree,)
    form: list[Any] = []
    tensors: list[Tensor] = []
    for k, arg in enumerate(args):
        _walk(f"args[{k}]", arg, Tensor, form, tensors)
    for name, arg in sorted(kwargs.items()):
        _walk(name, arg, Tensor, form, tensors)
    return tuple(form), tensors


def _walk(path: str, tree: Any, mark: type, form: list[Any], tensors: list[Tensor]) -> None:
    kind = type(tree)
    if kind in PLAIN:
        form.append((path, mark))
        tensors.append(tree)
    elif kind is PerMember:
        _walk(path, tree.tree, PerMember, form, tensors)
    elif isinstance(tree, Tensor):
        raise UnsupportedModelError(
            f"ens.capture(...): {path} is a {kind.__module__}.{kind.__name__}, and only plain"
            f" tensors can be captured; call the ensemble itself, ens(...)"
        )
    else:
        found = list(leaves(tree))
        if len(found) == 1 and found[0][1] is tree:
            form.append((path, Fixed(tree)))
            return
        form.append((path, kind, len(found)))
        for sub, leaf in found:
            _walk(path + sub, leaf, mark, form, tensors)


def copy_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments with a copy of each tensor, of the same strides and of no other's memory.

    Recording runs on copies: tensors are told apart by their place in memory, so one tensor that
    is passed twice has to become two; and what ``forward`` writes to its inputs is not seen.
    """

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, PerMember):
            return PerMember(tree_map(copy, leaf.tree))
        return _copy(leaf) if isinstance(leaf, Tensor) else leaf

    # One after another: a container that is passed twice becomes two as well.
    return (
        tuple([tree_map(copy, arg) for arg in args]),
        {name: tree_map(copy, arg) for name, arg in kwargs.items()},
    )


def _copy(tensor: Tensor) -> Tensor:
    source = tensor.detach()
    if source.is_conj() or source.is_neg() or source.numel() == 0:
        return source.clone()
    span = 1 + sum((n - 1) * s for n, s in zip(source.shape, source.stride(), strict=True))
    memory = source.as_strided((span,), (1,), source.storage_offset()).clone()
    return memory.as_strided(source.shape, source.stride(), 0)


def names_of(member: nn.Module, form: Form) -> list[str]:
    """A name for each tensor: that of the parameter of ``forward`` that takes it."""
    try:
        found = inspect.signature(member.forward).parameters.values()
    except (TypeError, ValueError):
        found = []  # type: ignore[assignment]
    places = [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = []
    for path, *kind in form:
        if kind in ([Tensor], [PerMember]):
            place, _, rest = path.removeprefix("args[").partition("]")
            is_known = path.startswith("args[") and int(place) < len(places)
            names.append(places[int(place)] + rest if is_known else path)
    return names


def facts(form: Form, tensors: Sequence[Tensor]) -> dict[str, str]:
    """Each argument in words, by its path, to say what differs."""
    rest = iter(tensors)
    found = {}
    for path, kind, *_ in form:
        if kind in (Tensor, PerMember):
            t = next(rest)
            mark = "per_member, " if kind is PerMember else ""
            words = f"{mark}shape {tuple(t.shape)}, {t.dtype}, {t.device}"
            found[path] = words if t.is_contiguous() else f"{words}, strides {t.stride()}"
        else:
            found[path] = repr(kind.value) if isinstance(kind, Fixed) else kind.__name__
    return found
