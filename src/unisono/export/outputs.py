"""The outputs of an export: containers that need no class of the user's, and names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unisono.engine.objects import attributes_of
from unisono.errors import ExportError

_CONSTANTS = (int, float, bool, str, type(None), torch.SymInt, torch.SymFloat, torch.SymBool)


def plain(call: str, tree: Any, path: str = "") -> Any:
    """The outputs in dicts, lists and tuples; objects and named tuples as dicts of their fields.

    So what loads an export needs no class but those of Python.

    Args:
        call: The public call, for messages.
        tree: What the ensemble returned.
        path: Where in the outputs it stands.

    Raises:
        ExportError: If a leaf is neither a tensor nor a number, text, or None.
    """
    if isinstance(tree, (Tensor, *_CONSTANTS)):
        return tree
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        tree = dict(zip(tree._fields, tree, strict=True))
    if isinstance(tree, Mapping):
        return {str(key): plain(call, item, _at(path, key)) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [plain(call, item, _at(path, k)) for k, item in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    attributes = attributes_of(tree)
    if attributes is None:
        raise ExportError(
            f"{call}: the output{f' `{path}`' if path else ''} is a {type(tree).__name__}; an"
            f" export returns tensors, numbers, texts and None, in dicts, lists, tuples,"
            f" dataclasses and objects with tensors in their attributes"
        )
    return {key: plain(call, item, _at(path, key)) for key, item in attributes}


def named(tree: Any, path: str = "") -> dict[str, Any]:
    """The leaves of `plain` outputs by dotted names, ``outputs`` for a single one."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list | tuple):
        items = [(k, item) for k, item in enumerate(tree)]
        path = path or "outputs"
    else:
        return {path or "outputs": tree}
    return {name: leaf for key, item in items for name, leaf in named(item, _at(path, key)).items()}


def _at(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
