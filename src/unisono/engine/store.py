"""Store what ``forward`` assigned to buffers and plain attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unisono.engine.axis import buffers_of, non_persistent_buffers_of
from unisono.engine.parts import Assigned
from unisono.engine.pool import Pool
from unisono.engine.template import Template
from unisono.engine.tree import tree_map
from unisono.errors import EnsembleError


def store(pool: Pool, template: Template, assigned: Sequence[Assigned], n: int) -> None:
    """Keep each assigned value where the next call will find it.

    A buffer is stored in the member tree, with the member axis unless it is shared. A plain
    attribute that differs between members becomes one stacked value there; one that is the same
    for all stays what it is, on the templates.
    """
    for item in assigned:
        tree = pool.members.get_submodule(item.path)
        if item.kind == "buffer":
            value = _one_for_all(item) if item.name in pool.shared else _stacked(item, n)
            if item.key in buffers_of(tree):
                buffers_of(tree)[item.key] = value
            else:
                _add_buffer(pool, template, item, value)
        elif item.key == "training":
            tree.training = item.value
        elif item.stacked or (item.path, item.key) in pool.attributes:
            vars(tree)[item.key] = _stacked(item, n)
            if (item.path, item.key) not in pool.attributes:
                pool.add_attribute(item.path, item.key)
        else:
            pool.keep(template, item.path, item.key, item.value)


def _stacked(item: Assigned, n: int) -> Any:
    """The value with a member axis, repeated if it has none."""
    if item.stacked:
        return item.value

    def repeat(leaf: Any) -> Any:
        return leaf.expand(n, *leaf.shape).clone() if isinstance(leaf, Tensor) else leaf

    return tree_map(repeat, item.value)


def _one_for_all(item: Assigned) -> Any:
    """The value without a member axis, for a buffer that is kept once."""
    if not item.stacked:
        return item.value
    first = item.value[:1]
    if not torch.equal(item.value, first.expand_as(item.value)):
        raise EnsembleError(
            f"ens(...): the buffer `{item.name}` is kept once for all members (shared=), but"
            f" forward assigns another value for each; leave it out of shared="
        )
    return first[0]


def _add_buffer(pool: Pool, template: Template, item: Assigned, value: Any) -> None:
    """Take in a buffer that ``forward`` registered: into the tree and the master template."""
    owner = template.module.get_submodule(item.path)
    persistent = item.key not in non_persistent_buffers_of(owner)
    tree = pool.members.get_submodule(item.path)
    tree.register_buffer(item.key, value, persistent=persistent)
    placeholder = None if value is None else torch.empty_like(value[0], device="meta")
    master = pool.module.get_submodule(item.path)
    master.register_buffer(item.key, placeholder, persistent=persistent)
    pool.renew()
