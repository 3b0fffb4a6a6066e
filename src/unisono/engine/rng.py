"""The random state of the devices that a call uses: read it, put it back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class RandomState(NamedTuple):
    """The state of the CPU's generator and of one generator for each accelerator."""

    cpu: Tensor
    others: tuple[tuple[torch.device, Tensor], ...]


def devices_of(tensors: Iterable[object]) -> frozenset[torch.device]:
    """The accelerators on which any of the tensors lies."""
    found = {t.device for t in tensors if isinstance(t, Tensor)}
    return frozenset(d for d in found if d.type not in ("cpu", "meta") and _is_available(d))


def get_state(devices: Iterable[torch.device]) -> RandomState:
    """Read the random state; no device waits for it."""
    return RandomState(
        torch.get_rng_state(),
        tuple((d, torch.get_device_module(d).get_rng_state(d)) for d in devices),
    )


def set_state(state: RandomState) -> None:
    """Put the random state back."""
    torch.set_rng_state(state.cpu)
    for device, value in state.others:
        torch.get_device_module(device).set_rng_state(value, device)


def is_equal(a: RandomState, b: RandomState) -> bool:
    """Whether nothing was drawn between the two readings."""
    pairs = [(a.cpu, b.cpu), *((x, y) for (_, x), (_, y) in zip(a.others, b.others, strict=True))]
    return all(torch.equal(x, y) for x, y in pairs)


def _is_available(device: torch.device) -> bool:
    # A fake tensor claims a device that the machine may not have.
    available: bool = torch.get_device_module(device).is_available()
    return available
