"""`Block`: the place of some members among all, when others are on other ranks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from unisono.collectives import MEMBER

DATA = "data"


@dataclass(frozen=True, eq=False)
class Block:
    """The members of one rank: ``first, ..., first + size - 1`` of ``num_members``.

    Args:
        num_members: Of the whole ensemble, on all ranks.
        first: The first member of this rank, counted from 0.
        size: How many there are on this rank.
        index: Which of the blocks this is.
        num_blocks: How many blocks the members are split into.
        replica: Which of the replicas of the block this is; it says which part of a batch is its
            own.
        num_replicas: How many ranks hold these very members.
        mesh: The ranks, with an axis ``"member"``, and ``"data"`` if blocks have replicas. A block
            that comes out of a pickle has none: the ranks were those of another process.

    Example:
        >>> Block(9, 3, 2).members
        range(3, 5)
    """

    num_members: int
    first: int
    size: int
    index: int = 0
    num_blocks: int = 1
    replica: int = 0
    num_replicas: int = 1
    mesh: DeviceMesh | None = None

    @property
    def members(self) -> range:
        """This rank's members, by their numbers in the whole ensemble."""
        return range(self.first, self.first + self.size)

    @property
    def slice(self) -> slice:
        """Where they stand among all, as in ``rates[block.slice]`` of a list with N numbers."""
        return slice(self.first, self.first + self.size)

    @property
    def place(self) -> int:
        """The number of this rank among all of the mesh."""
        return self.index * self.num_replicas + self.replica

    @property
    def num_places(self) -> int:
        """The number of ranks."""
        return self.num_blocks * self.num_replicas

    def __deepcopy__(self, memo: dict[int, Any]) -> Block:
        """Itself: a copy of the members stands at the same place."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """All but the mesh."""
        return {**vars(self), "mesh": None}


def block_of(num_members: int, mesh: DeviceMesh) -> Block:
    """The block that this rank has of so many members.

    Args:
        num_members: Of the whole ensemble, at least one for each rank of the axis ``"member"``.
        mesh: A mesh that `unisono.distributed.make_mesh` could have made.
    """
    names = mesh.mesh_dim_names or ()
    sizes = dict(zip(names, mesh.shape, strict=True))
    index = mesh.get_local_rank(MEMBER)
    members = split_members(num_members, sizes[MEMBER])[index]
    return Block(
        num_members=num_members,
        first=members.start,
        size=len(members),
        index=index,
        num_blocks=sizes[MEMBER],
        replica=mesh.get_local_rank(DATA) if DATA in names else 0,
        num_replicas=sizes.get(DATA, 1),
        mesh=mesh,
    )


def split_members(num_members: int, num_blocks: int) -> list[range]:
    """Blocks of consecutive members, the first ones longer by one where they can't be equal.

    Args:
        num_members: N.
        num_blocks: How many, at most N: none is empty.

    Example:
        >>> split_members(9, 4)
        [range(0, 3), range(3, 5), range(5, 7), range(7, 9)]
    """
    if not 1 <= num_blocks <= num_members:
        raise ValueError(f"{num_members} members make 1 to {num_members} blocks, not {num_blocks}")
    small, larger = divmod(num_members, num_blocks)
    starts = [k * small + min(k, larger) for k in range(num_blocks + 1)]
    return [range(a, b) for a, b in pairwise(starts)]
