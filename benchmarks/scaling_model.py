"""Step time and memory of a rank by formulas, from step times that one rank has measured."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

FLOAT = 4  # bytes of a number
COPIES = 4  # of the parameters: they, their gradients, and the two averages of Adam
OF_EPOCH = 24  # bytes that `fit` sends for a member at the end of an epoch: losses, rates, flags


@dataclass(frozen=True)
class Network:
    """A member, and what it is trained on.

    Args:
        parameters: Numbers that a member owns.
        activations: Numbers that it keeps for the backward pass, for each row.
        features: Numbers in a row of the inputs, which all members share.
        rows: Rows of a minibatch, B.
        steps: Minibatches of an epoch.
    """

    parameters: int
    activations: int
    features: int
    rows: int
    steps: int


@dataclass(frozen=True)
class Link:
    """What connects two ranks.

    Args:
        bandwidth: Bytes per second in one direction.
        latency: Seconds that a message of no length takes.
    """

    bandwidth: float
    latency: float


def members_of(num_members: int, blocks: int) -> int:
    """The members of the largest block: ``ceil(N / blocks)``."""
    return -(-num_members // blocks)


def compute_seconds(members: int, measured: Mapping[int, float]) -> float:
    """A step of one rank that talks to nobody.

    Between two measured numbers of members it is on the line through both; above the largest it
    grows as the number, below the smallest it is that of the smallest. What was measured is made
    to grow with the number first: noise would make more members cheaper.

    Args:
        members: Of this rank, n.
        measured: Number of members -> seconds.
    """
    counts = sorted(measured)
    seconds = [max(measured[c] for c in counts[: k + 1]) for k in range(len(counts))]
    if members <= counts[0]:
        return seconds[0]
    if members >= counts[-1]:
        return seconds[-1] * members / counts[-1]
    k = bisect_left(counts, members)
    part = (members - counts[k - 1]) / (counts[k] - counts[k - 1])
    return seconds[k - 1] + part * (seconds[k] - seconds[k - 1])


def sum_seconds(size: float, ranks: int, link: Link) -> float:
    """A sum over ranks in a ring: ``2 (R - 1) (size / R / bandwidth + latency)``.

    Args:
        size: Bytes of what is summed.
        ranks: R.
        link: Between neighbours.
    """
    return 2 * (ranks - 1) * (size / ranks / link.bandwidth + link.latency)


def gather_seconds(size: float, ranks: int, link: Link) -> float:
    """What each rank has goes to all, in a ring: ``(R - 1) (size / bandwidth + latency)``.

    Args:
        size: Bytes of a rank.
        ranks: R.
        link: Between neighbours.
    """
    return (ranks - 1) * (size / link.bandwidth + link.latency)


def step_seconds(
    num_members: int,
    blocks: int,
    network: Network,
    measured: Mapping[int, float],
    link: Link,
    *,
    replicas: int = 1,
) -> float:
    """A step of `fit`, with a step's part of what ranks tell each other at the end of an epoch.

    ``compute(n) + sum(gradients of n members) + gather(24 n bytes) / steps``, where n are the
    members of the largest block. Replicas take parts of the minibatch; that this makes a step
    shorter is left out, so the sum is what a replica costs.

    Args:
        num_members: N.
        blocks: Ranks with members of their own, at most N.
        network: A member.
        measured: See `compute_seconds`.
        link: Between ranks.
        replicas: Of each block.
    """
    members = members_of(num_members, blocks)
    gradients = FLOAT * network.parameters * members
    at_the_end = gather_seconds(OF_EPOCH * members, blocks * replicas, link)
    return (
        compute_seconds(members, measured)
        + sum_seconds(gradients, replicas, link)
        + at_the_end / network.steps
    )


def memory_bytes(num_members: int, blocks: int, network: Network, *, whole: bool = False) -> int:
    """What a rank holds in a training by Adam, in float32.

    ``16 P n + 4 n B A + 4 B features``: parameters, gradients and averages of n members, what they
    keep for the backward pass, a minibatch.

    Args:
        num_members: N.
        blocks: Ranks with members of their own.
        network: A member.
        whole: Whether `fit` was given the whole ensemble, on every rank: then parameters and
            averages of all N are there as well, ``12 P N`` bytes, unless one rank has all.
    """
    members = members_of(num_members, blocks)
    state = COPIES * network.parameters * members
    kept = members * network.rows * network.activations
    home = (COPIES - 1) * network.parameters * num_members if whole and blocks > 1 else 0
    return FLOAT * (state + kept + home + network.rows * network.features)


def shown_bytes(size: float) -> str:
    """As text, in units of 1000."""
    power = max(0, min(4, int(math.log10(max(size, 1)) // 3)))
    return f"{size / 1000**power:.3g} {['B', 'kB', 'MB', 'GB', 'TB'][power]}"


def shown_seconds(seconds: float) -> str:
    """As text, in the unit that suits."""
    if seconds >= 120:
        return f"{seconds / 60:.3g} min"
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
