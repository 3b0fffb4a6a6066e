"""What a model is beside the values of its tensors, as text that can stand in a file.

Two models with equal names and shapes may still compute different things: another stride,
activation or dropout. So a file keeps the outline of the model that it was saved from, and
loading compares it with that of the model that is to take the tensors.
"""

from __future__ import annotations

import functools
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from unisono.copies import attributes_of
from unisono.describe import class_name
from unisono.module_tree import named_tensors

Outline: TypeAlias = dict[str, dict[str, str]]

_CLASS: Final = "class"
_LONGEST: Final = 200  # characters of one value
# Where a value lies isn't what it is: a model is saved on one device and loaded on another.
_PLAIN: Final = (bool, int, float, complex, str, bytes, type(None), torch.dtype, slice, range)


def outline(model: nn.Module) -> Outline:
    """Classes and plain attributes of all modules, as text.

    Args:
        model: A member.

    Returns:
        Dotted path of a module -> ``"class"`` and the names of its plain attributes -> text.
        Left out are private attributes, tensors, and objects of other kinds.

    Example:
        >>> outline(nn.Dropout(0.5))
        {'': {'class': 'torch.nn.modules.dropout.Dropout', 'p': '0.5', 'inplace': 'False'}}
    """
    return {path: _outline(module) for path, module in model.named_modules()}


def ties(model: nn.Module) -> dict[str, str]:
    """Names that stand for a tensor with another name -> that first name.

    Example:
        >>> model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        >>> model["b"].weight = model["a"].weight
        >>> ties(model)
        {'b.weight': 'a.weight'}
    """
    first: dict[int, str] = {}
    return {
        name: first[id(tensor)]
        for name, tensor in named_tensors(model).items()
        if first.setdefault(id(tensor), name) != name
    }


def contradictions(saved: Mapping[str, Mapping[str, str]], model: nn.Module) -> list[str]:
    """In what the modules of torch itself differ between a saved model and this one.

    Their attributes are all hyperparameters: with others, the same tensors compute something else.

    Args:
        saved: The `outline` that was kept.
        model: The model to take the tensors.

    Returns:
        One fact a line.
    """
    return list(_differences(saved, model, own=False))


def remarks(saved: Mapping[str, Mapping[str, str]], model: nn.Module) -> list[str]:
    """In what the modules of a user's own classes differ; that may be on purpose.

    A class is renamed or moved, a plain attribute counts calls: such differences must not keep
    anyone from their weights.
    """
    return list(_differences(saved, model, own=True))


def _differences(
    saved: Mapping[str, Mapping[str, str]], model: nn.Module, *, own: bool
) -> Iterator[str]:
    for path, module in model.named_modules():
        before, now = saved.get(path), _outline(module)
        if before is None:
            continue  # a module without tensors may be new; names and shapes are compared apart
        is_torch = before[_CLASS].startswith("torch.") or now[_CLASS].startswith("torch.")
        if own == is_torch:
            continue
        where = f"`{path}`" if path else "the model"
        if _short(before[_CLASS]) != _short(now[_CLASS]):
            yield f"{where}: saved as {before[_CLASS]}, now {now[_CLASS]}"
            continue
        for name in sorted(before.keys() & now.keys() - {_CLASS}):
            if before[name] != now[name]:
                yield f"{where}: {name} was {before[name]}, now {now[name]}"


def _short(name: str) -> str:
    """A class by its name alone: a script's is in `__main__`, and elsewhere once imported."""
    return name if name.startswith("torch.") else name.rpartition(".")[2]


def _outline(module: nn.Module) -> dict[str, str]:
    found = {_CLASS: class_name(type(module))}
    for name, value in attributes_of(module).items():
        text = None if name.startswith("_") or name == _CLASS else _text(value)
        if text is not None:
            found[name] = text if len(text) <= _LONGEST else _cut(text)
    return found


def _cut(text: str) -> str:
    return f"{text[:_LONGEST]}… (CRC-32 {zlib.crc32(text.encode(errors='replace')):08x})"


def _text(value: Any, depth: int = 0) -> str | None:
    """A value as text that is the same in every process; None if there is none."""
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, (Tensor, nn.Module, torch.device)) or depth > 4:
        return None
    if isinstance(value, np.ndarray):
        return f"array of shape {value.shape}, dtype {value.dtype}"
    if isinstance(value, type):
        return class_name(value)
    if isinstance(value, functools.partial):
        parts = [_text(part, depth + 1) for part in (value.func, value.args, value.keywords)]
        return None if None in parts else f"partial({', '.join(map(str, parts))})"
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return f"function {value.__qualname__}"  # its module has another name in a script
    if type(value) in (list, tuple, set, frozenset, dict):
        return _text_of_container(value, depth)
    return None


def _text_of_container(value: Any, depth: int) -> str | None:
    pairs = value.items() if isinstance(value, dict) else [("", item) for item in value]
    texts = []
    for key, item in pairs:
        text = _text(item, depth + 1)
        if text is None:
            return None
        texts.append(f"{key!r}: {text}" if isinstance(value, dict) else text)
    if isinstance(value, (set, frozenset)):
        texts.sort()
    return f"{type(value).__name__}({', '.join(texts)})"
