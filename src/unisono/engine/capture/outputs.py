"""What a call returns: a tree in which each replay puts its own tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from unisono.engine.tree import tree_map

_WRITTEN_OUT: Final = (bool, int, str, type(None))


class Outputs:
    """The outputs of the recorded call without their tensors.

    Args:
        tree: The outputs.

    Attributes:
        tensors: The tensors in them; to be dropped once they are known by name.
    """

    def __init__(self, tree: Any) -> None:
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}  # id of a placeholder -> number of the tensor
        self._tree = tree_map(self._take, tree)

    def text(self) -> str | None:
        """Python text with ``{0}``, ``{1}`` for tensors; None if it takes `rebuild`."""
        return self._text(self._tree)

    def rebuild(self) -> Callable[..., Any]:
        """A function from the tensors to the outputs."""
        tree, places = self._tree, self._places

        def rebuild(*tensors: Tensor) -> Any:
            return tree_map(
                lambda leaf: tensors[places[id(leaf)]] if id(leaf) in places else leaf, tree
            )

        return rebuild

    def _take(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        placeholder = torch.empty_like(leaf, device="meta")
        self._places[id(placeholder)] = len(self.tensors)
        self.tensors.append(leaf)
        return placeholder

    def _text(self, tree: Any) -> str | None:
        kind = type(tree)
        if id(tree) in self._places:
            return f"{{{self._places[id(tree)]}}}"
        if kind in _WRITTEN_OUT:
            return _escaped(tree)
        if kind is dict and all(type(key) is str for key in tree):
            items = [(_escaped(key), self._text(value)) for key, value in tree.items()]
            pairs = [f"{key}: {value}" for key, value in items if value is not None]
            return f"{{{{{', '.join(pairs)}}}}}" if len(pairs) == len(items) else None
        if kind in (list, tuple):
            parts = [part for part in map(self._text, tree) if part is not None]
            inner = ", ".join(parts)
            if len(parts) < len(tree):
                return None
            if kind is list:
                return f"[{inner}]"
            return f"({inner},)" if len(parts) == 1 else f"({inner})"
        return None


def _escaped(value: Any) -> str:
    """Its text, to stand in a format string."""
    return repr(value).replace("{", "{{").replace("}", "}}")
