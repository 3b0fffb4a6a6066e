"""What the processes of one job have in common: numbers and texts in the store of `torchrun`.

Each start of the processes has its own part of the store (`unisono.distributed.meeting`). What a
process that died had claimed is therefore free again when they are started anew: no lock files that
somebody has to remove, no clocks to compare.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol

from unisono.commands.outcome import ArgumentError, CommandError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # public, not in its stubs

_PATIENCE: Final = timedelta(minutes=30)  # with ranks that do nothing
_POLL: Final = 0.1  # seconds


class Ranks(Protocol):
    """The processes of a job."""

    rank: int

    def share(self, make: Callable[[], Any]) -> Any:
        """Give every rank what `make` returns on rank 0: something that JSON can hold.

        Raises:
            CommandError: If rank 0 raised one; on every rank.
        """

    def add(self, name: str, amount: int = 1) -> int:
        """Add to a number that all ranks see, and return it; it begins with 0."""

    def gather(self, report: Any, on_wait: Callable[[], None]) -> list[Any] | None:
        """Give rank 0 the reports of all ranks, and the others None.

        Args:
            report: Something that JSON can hold.
            on_wait: Called now and then while rank 0 waits.

        Raises:
            CommandError: If a rank does nothing for half an hour.
        """


class Alone:
    """One process that does everything."""

    rank = 0

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()

    def share(self, make: Callable[[], Any]) -> Any:
        """See `Ranks`."""
        return make()

    def add(self, name: str, amount: int = 1) -> int:
        """See `Ranks`."""
        self._numbers[name] += amount
        return self._numbers[name]

    def gather(self, report: Any, on_wait: Callable[[], None]) -> list[Any] | None:
        """See `Ranks`."""
        return [report]


class StoreRanks:
    """The processes that `torchrun` started, each of which makes one.

    Args:
        store: Which all of them reach.
        rank: This process.
        num_ranks: How many there are.
        patience: How long to wait for ranks that do nothing.
    """

    def __init__(
        self, store: Store, rank: int, num_ranks: int, *, patience: timedelta = _PATIENCE
    ) -> None:
        self.rank = rank
        self._num_ranks = num_ranks
        self._store = store
        self._patience = patience
        store.set_timeout(patience)

    def share(self, make: Callable[[], Any]) -> Any:
        """See `Ranks`."""
        if self.rank == 0:
            try:
                value = make()
            except CommandError as error:
                self._store.set("plan", json.dumps({"error": str(error)}))
                raise
            self._store.set("plan", json.dumps({"value": value}))
            return value
        found = json.loads(self._store.get("plan"))
        if "error" in found:
            raise ArgumentError(found["error"])
        return found["value"]

    def add(self, name: str, amount: int = 1) -> int:
        """See `Ranks`."""
        return int(self._store.add(name, amount))

    def gather(self, report: Any, on_wait: Callable[[], None]) -> list[Any] | None:
        """See `Ranks`."""
        self._store.set(f"report/{self.rank}", json.dumps(report))
        ended = self.add("reports")
        if self.rank:
            return None
        # The store may be in this process: it ends last.
        before, since = None, time.monotonic()
        while ended < self._num_ranks:
            on_wait()
            done = (self.add("rows", 0), ended)
            if done != before:
                before, since = done, time.monotonic()
            if time.monotonic() - since > self._patience.total_seconds():
                missing = [k for k in range(self._num_ranks) if not self._has_ended(k)]
                raise CommandError(
                    f"ranks {', '.join(map(str, missing))} of {self._num_ranks} have done nothing "
                    f"for {self._patience.total_seconds() / 60:g} minutes; what is finished is "
                    "kept, and the same command goes on from there"
                )
            time.sleep(_POLL)
            ended = self.add("reports", 0)
        return [json.loads(self._store.get(f"report/{k}")) for k in range(self._num_ranks)]

    def _has_ended(self, rank: int) -> bool:
        return bool(self._store.check([f"report/{rank}"]))


def are_given() -> bool:
    """Say whether this process was started by `torchrun`, or by something that tells the same."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the processes that the environment tells of; alone if it tells of none.

    Raises:
        ArgumentError: If it tells of some that can't be reached.
        CommandError: If they can't be reached any more.
    """
    if not are_given():
        yield Alone()
        return
    import torch.distributed as dist

    from unisono.distributed.meeting import new_store
    from unisono.errors import EnsembleError

    try:
        store, rank, num_ranks = new_store("unisono predict", _PATIENCE)
    except (ValueError, dist.DistError, EnsembleError) as error:
        raise ArgumentError(
            f"RANK is set, but the other processes aren't there: {error}"
        ) from error
    try:
        yield StoreRanks(store, rank, num_ranks)
    except dist.DistError as error:
        raise CommandError(
            f"rank {rank} lost the other processes: {error}; what is finished is kept, and the "
            "same command goes on from there"
        ) from error
