"""Templates for calls that run at the same time."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from unisono.engine.joining import Rooms
from unisono.engine.template import Template
from unisono.engine.tree import tree_map


class Pool:
    """Lends a `Template` to each call, and makes another when all are in use.

    Args:
        module: The master copy of the member's tree; it is copied, never run.
        members: The tree that owns the stacked tensors.
        shared: Names of the tensors without a member axis.

    Attributes:
        only_state: What the optimizer keeps, if nobody but it and the library holds the
            parameters; None if others may.
        rooms: Memory that gradients had, for those to come.
    """

    def __init__(self, module: nn.Module, members: nn.Module, shared: Collection[str]) -> None:
        self.module = module
        self.members = members
        self.shared = frozenset(shared)
        self.attributes: frozenset[tuple[str, str]] = frozenset()
        self.only_state: Mapping[Tensor, Any] | None = None
        self.rooms: Rooms = {}
        self._idle: list[Template] = []
        self._generation = 0

    def __getstate__(self) -> dict[str, Any]:
        """All but what is tied to the tensors of this very ensemble."""
        return {**vars(self), "_idle": [], "rooms": {}, "only_state": None}

    def take(self) -> Template:
        """A template that no other call uses until it is given back."""
        try:
            return self._idle.pop()  # one step, so two threads never get the same one
        except IndexError:
            pass  # all are in use
        return Template(
            copy.deepcopy(self.module),
            self.members,
            self.shared,
            self.attributes,
            generation=self._generation,
            only_state=self.only_state,
            rooms=self.rooms,
        )

    def give_back(self, template: Template) -> None:
        """Let other calls use the template, unless it is out of date."""
        if template.generation == self._generation:
            self._idle.append(template)

    def renew(self) -> None:
        """Make new templates from now on; those in use are dropped when their call ends."""
        self._generation += 1
        self._idle = []

    def add_attribute(self, path: str, key: str) -> None:
        """Treat a plain attribute as one value per member from the next call on."""
        self.attributes |= {(path, key)}
        self.renew()

    def keep(self, template: Template, path: str, key: str, value: Any) -> None:
        """Store a plain attribute in this template and for those to come."""
        template.keep(path, key, value)
        # The master is copied, and a tensor with a gradient history can't be.
        vars(self.module.get_submodule(path))[key] = tree_map(_without_history, value)


def _without_history(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) and leaf.grad_fn is not None else leaf
