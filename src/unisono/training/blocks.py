"""Where a training stands of which each rank has a block: put together, and cut up again.

What comes out is what one process would have, so a file of it is read by any number of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from unisono.collectives import gather_values
from unisono.optim.groups import Group, join, pick
from unisono.training.ranks import Ranks

T = TypeVar("T")


def rows_of_all(
    tensors: Mapping[str, Tensor], stacked: Collection[str], ranks: Ranks
) -> dict[str, Tensor]:
    """The tensors with the rows of all members, on the host of the first rank.

    Args:
        tensors: Of this rank's block, by name.
        stacked: Those that have a row for each member.
        ranks: The ranks.

    Shape:
        - returns: (N, *) for those that are stacked
    """
    group = ranks.group
    assert group is not None
    found = dict(tensors)
    for name in (name for name in tensors if name in stacked):
        every = gather_values(tensors[name], group)
        if ranks.is_first:
            found[name] = every.cpu()
    return found


def rows_of_block(
    tensors: Mapping[str, Tensor], stacked: Collection[str], ranks: Ranks
) -> dict[str, Tensor]:
    """Undo `rows_of_all`."""
    rows = ranks.block.slice
    return {name: t[rows] if name in stacked else t for name, t in tensors.items()}


def groups_of_all(groups: Sequence[Group], ranks: Ranks) -> list[Group]:
    """The param groups of all members, from those of the state of each block's optimizer."""
    parts = ranks.first_replicas(ranks.gather((ranks.block.size, list(groups))))
    return join(parts)


def groups_of_block(groups: Sequence[Group], own: Sequence[Group], ranks: Ranks) -> list[Group]:
    """Undo `groups_of_all`.

    Args:
        groups: Those of all members.
        own: Those of the state of this block's optimizer, which stay its own but for the values.
        ranks: The ranks.

    Raises:
        ValueError: If the optimizer has other groups.
    """
    block = ranks.block
    found = pick(groups, block.num_members, list(block.members))
    return [
        {**new, "params": mine["params"], "member": mine["member"]}
        for new, mine in zip(found, own, strict=True)
    ]


def schedule_of_all(
    state: Mapping[str, Any], groups: Sequence[Group], ranks: Ranks
) -> dict[str, Any]:
    """The state of a scheduler for all members; lists in it have an entry for each param group."""
    marks = [{"member": group["member"], "params": [], "at": k} for k, group in enumerate(groups)]
    own = ranks.block.size, marks, dict(state)
    parts = ranks.first_replicas(ranks.gather(own))
    marked = [
        (n, [{**mark, "at": (b, mark["at"])} for mark in marks])
        for b, (n, marks, _) in enumerate(parts)
    ]
    order = [group["at"] for group in join(marked)]
    states = [each for _, _, each in parts]
    return {
        key: [states[b][key][k] for b, k in order] if _is_list(value, len(marks)) else value
        for key, value in states[0].items()
    }


def schedule_of_block(
    state: Mapping[str, Any], groups: Sequence[Group], ranks: Ranks
) -> dict[str, Any]:
    """Undo `schedule_of_all`.

    Args:
        state: Of all members.
        groups: The param groups of all members.
        ranks: The ranks.
    """
    block = ranks.block
    marks = [{"member": group["member"], "at": k} for k, group in enumerate(groups)]
    order = [mark["at"] for mark in pick(marks, block.num_members, list(block.members))]
    return {
        key: [value[k] for k in order] if _is_list(value, len(groups)) else value
        for key, value in state.items()
    }


def _is_list(value: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length
