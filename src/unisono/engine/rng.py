"""The random state of the devices that a call uses: read it, put it back."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


@contextmanager
def drawing_apart(place: int, devices: Iterable[torch.device]) -> Iterator[None]:
    """Let equal generators draw different numbers at each place, and be equal again afterwards.

    For processes that go through the same program: each draws numbers of its own in here, and
    afterwards all generators are as before, if nothing was drawn, or one step further. So what is
    drawn outside, such as the order of the rows, remains the same in all processes.

    Args:
        place: The number of this process.
        devices: The accelerators, beside the CPU.
    """
    devices = list(devices)
    before = get_state(devices)
    seed = zlib.crc32(before.cpu.numpy().data)
    for _, value in before.others:
        seed = zlib.crc32(value.numpy().data, seed)
    # torch's generator of the CPU takes 32 bits of a seed. An odd factor: no two places are equal.
    _seed_all((seed + (place + 1) * 0x9E3779B1) % 2**32, devices)
    seeded = get_state(devices)
    try:
        yield
    finally:
        has_drawn = not is_equal(seeded, get_state(devices))
        set_state(before)
        if has_drawn:
            _seed_all(seed, devices)


def _seed_all(seed: int, devices: Iterable[torch.device]) -> None:
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.get_device_module(device).device(device):
            torch.get_device_module(device).manual_seed(seed)


def _is_available(device: torch.device) -> bool:
    # A fake tensor claims a device that the machine may not have.
    available: bool = torch.get_device_module(device).is_available()
    return available
