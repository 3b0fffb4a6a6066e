"""Random numbers that depend on a seed, a purpose, a member and an epoch, and on nothing else."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of random numbers is for; the values are part of what a seed means."""

    ROWS = 0
    ORDER = 1
    COMMON_ORDER = 2
    FOLDS = 3
    WORKERS = 4


def seed_sequence(
    seed: int, purpose: Purpose, member: int = 0, epoch: int = 0
) -> np.random.SeedSequence:
    """The source of one stream, which depends on nothing but the arguments."""
    return np.random.SeedSequence(seed, spawn_key=(purpose, member, epoch))


def stream(seed: int, purpose: Purpose, member: int = 0, epoch: int = 0) -> np.random.Generator:
    """The random numbers of one member for one purpose, in one epoch."""
    return np.random.default_rng(seed_sequence(seed, purpose, member, epoch))
