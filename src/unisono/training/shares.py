"""Who trains which members when some have stopped: the rest is spread evenly over the ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def spread_evenly(held: Sequence[Sequence[int]], members: Collection[int]) -> list[list[int]]:
    """Move members between ranks if that makes the largest share smaller, and no more than that.

    Args:
        held: For each block the members that it has; each member is in one of them.
        members: Those that train on. The others stay where they are.

    Returns:
        The same with members moved, each list ascending; a block without a member that trains
        is one that had none.

    Example:
        >>> spread_evenly([[0, 1, 2, 3], [4, 5, 6, 7]], [0, 1, 4])
        [[0, 1, 2, 3], [4, 5, 6, 7]]
        >>> spread_evenly([[0, 1, 2, 3], [4, 5, 6, 7]], [0, 1, 2, 3])
        [[0, 1], [2, 3, 4, 5, 6, 7]]
    """
    chosen = frozenset(members)
    train = [[i for i in own if i in chosen] for own in held]
    small, larger = divmod(sum(map(len, train)), len(held))
    if max(map(len, train)) <= small + (larger > 0):
        return [list(own) for own in held]
    # Those with the most keep the most.
    order = sorted(range(len(held)), key=lambda b: (-len(train[b]), b))
    room = {b: small + (k < larger) for k, b in enumerate(order)}
    spare = [i for b, own in enumerate(train) for i in own[room[b] :]]
    moved = []
    for b, own in enumerate(held):
        free = max(0, room[b] - len(train[b]))
        taken, spare = spare[:free], spare[free:]
        leave = frozenset(train[b][room[b] :])
        stays = [i for i in own if i not in leave]
        moved.append(sorted([*stays, *taken]))
    return moved
