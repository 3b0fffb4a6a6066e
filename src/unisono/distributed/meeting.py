"""Where the processes of a job meet before there is a group: the store of `torchrun`."""

from __future__ import annotations

import itertools
import secrets
import time
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from unisono.errors import EnsembleError

_POLL: Final = 0.02  # seconds
_numbers = itertools.count()
_met: Final[list[tuple[Any, int, int]]] = []  # once in a process: there is one port


def new_store(call: str, timeout: timedelta) -> tuple[Any, int, int]:
    """A store in which no group was made before, with this process' rank and their number.

    Every process has to call it equally often.

    Args:
        call: The function that the user called, for the message.
        timeout: How long to wait for the others.

    Raises:
        EnsembleError: If one of the others doesn't come.
    """
    if not _met:
        _met.append(_meet(call, timeout))
    store, rank, world = _met[0]
    own = dist.PrefixStore(f"{next(_numbers)}", store)  # type: ignore[attr-defined]
    own.set_timeout(timeout)
    return own, rank, world


def _meet(call: str, timeout: timedelta) -> tuple[Any, int, int]:
    store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
    own = dist.PrefixStore("unisono", store)  # type: ignore[attr-defined]
    name = name_of_this_start(call, own, rank, world, timeout)
    return dist.PrefixStore(name, own), rank, world  # type: ignore[attr-defined]


def name_of_this_start(call: str, store: Any, rank: int, world: int, timeout: timedelta) -> str:
    """A name that only those processes know that run now, the same for all of them.

    After a fault `torchrun` starts all processes anew, but keeps the store, with the addresses of
    those that are dead; a group would call at them (https://github.com/pytorch/pytorch/issues/135712).
    Its count of restarts tells starts apart on one machine, but each machine has its own count.
    So the first process names the start. It tells the name to whoever has left a word at
    the place of a rank, until each rank has answered: the dead ones don't.

    Args:
        call: The function that the user called, for the message.
        store: Common to all processes of this start, and of those before.
        rank: Of this process.
        world: How many there are.
        timeout: How long to wait for each of the others.

    Raises:
        EnsembleError: If one of them doesn't come.
    """
    word = secrets.token_hex(8)
    if rank > 0:
        store.set(f"word/{rank}", word)
        try:
            name: str = store.get(f"name/{word}").decode()
        except RuntimeError as error:
            raise _missing(call, 0, timeout) from error
        store.set(f"answer/{name}/{rank}", "")
        return name
    for other in range(1, world):
        end = time.monotonic() + timeout.total_seconds()
        while not store.check([f"answer/{word}/{other}"]):
            if store.check([f"word/{other}"]):
                store.set(f"name/{store.get(f'word/{other}').decode()}", word)
            if time.monotonic() > end:
                raise _missing(call, other, timeout)
            time.sleep(_POLL)
    return word


def _missing(call: str, rank: int, timeout: timedelta) -> EnsembleError:
    return EnsembleError(
        f"{call}: rank {rank} has not come within {timeout.total_seconds():g} s; it has ended, or"
        f" hangs, or it calls something else first. Every rank runs the same script"
    )
