"""Random numbers that follow from the seed and the epoch alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def random_numbers_of(seed: int, epoch: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python for one epoch; put them back after.

    An epoch is then the same whether or not those before it ran in this process.

    Args:
        seed: Of the training.
        epoch: Counted from 0.
        device: Where the training runs.
    """
    own = np.random.SeedSequence([seed, epoch]).generate_state(3, np.uint32)
    with random_state_kept(device):
        torch.manual_seed(int(own[0]))
        np.random.seed(own[1])
        random.seed(int(own[2]))
        yield


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the global generators of torch, NumPy and Python back afterwards.

    Args:
        device: Where random numbers are drawn, beside the CPU.
    """
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
