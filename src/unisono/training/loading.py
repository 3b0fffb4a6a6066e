"""Minibatches loaded by a `DataLoader`, with its workers, its collation and its pinned memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unisono.engine.inputs import per_member
from unisono.engine.tree import tree_map
from unisono.training.draws import Draws
from unisono.training.kinds import Rows
from unisono.training.loader_checks import check_collated
from unisono.training.streams import Purpose, seed_sequence


class StepSampler:
    """The batch sampler of a loader that lives for the whole training.

    It stays in the main process; workers get lists of rows, so their number changes nothing.

    Args:
        draws: The rows of each step.
    """

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._chosen: tuple[int, list[int]] = (0, [0])

    def choose(self, epoch: int, members: Sequence[int]) -> None:
        """Give the rows of this epoch from the next iteration on."""
        self._chosen = (epoch, list(members))

    def __len__(self) -> int:
        return len(self._draws.sizes)

    def __iter__(self) -> Iterator[list[int]]:
        steps = self._draws.steps(*self._chosen)  # now: a later choice is for later iterations
        return (rows.ravel().tolist() for rows in steps)


class DatasetBatches:
    """Minibatches of a map-style data set, in the orders of the members.

    Args:
        loader: Its options are taken over, except for those that choose rows.
        draws: The rows of each step.
        device: Where the minibatches are to lie; None for where they are loaded.
    """

    def __init__(self, loader: DataLoader[Any], draws: Draws, device: torch.device | None) -> None:
        self._draws = draws
        self._device = device
        self._sampler = StepSampler(draws)
        # The seeds of workers come from it. One of our own leaves the global one alone.
        own = torch.Generator() if loader.generator is None else None
        self._own_generator = own
        self._loader = _with_sampler(loader, self._sampler, own or loader.generator)
        self.generators = () if own else (loader.generator,)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each minibatch, as one member sees them."""
        return self._draws.sizes

    @property
    def num_steps(self) -> int:
        """Minibatches of an epoch."""
        return len(self._draws.sizes)

    def held_out(self) -> tuple[Rows, ...]:
        """See `Batches.held_out`."""
        return self._draws.held_out()

    def epoch(self, epoch: int, members: Sequence[int]) -> Iterator[Any]:
        """See `Batches.epoch`; persistent workers serve one epoch at a time."""
        self._sampler.choose(epoch, members)
        if self._own_generator is not None:
            source = seed_sequence(self._draws.seed, Purpose.WORKERS, epoch=epoch)
            self._own_generator.manual_seed(int(source.generate_state(1)[0]))
        for batch, size in zip(self._loader, self._draws.sizes, strict=True):
            if self._draws.sampling.is_shared:
                yield to_device(batch, self._device)
            else:
                check_collated(batch, len(members), size)
                yield _by_member(to_device(batch, self._device), len(members), size)


class LoaderBatches:
    """Minibatches of a loader of the caller, as it makes them, for all members.

    Args:
        loader: The loader.
        device: Where the minibatches are to lie; None for where they are loaded.
    """

    sizes: tuple[int, ...] | None = None

    def __init__(self, loader: DataLoader[Any], device: torch.device | None) -> None:
        self._loader = loader
        self._device = device

    @property
    def num_steps(self) -> int | None:
        """Minibatches of an epoch; None if the loader has no length."""
        try:
            return len(self._loader)
        except (TypeError, NotImplementedError):  # what torch's own classes raise then
            return None

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """The generators of the loader and of its samplers."""
        owners = [self._loader, *_samplers(self._loader)]
        found = [getattr(owner, "generator", None) for owner in owners]
        unique = {id(one): one for one in found if isinstance(one, torch.Generator)}
        return tuple(unique.values())

    def held_out(self) -> tuple[Rows, ...]:
        """Nothing is known of it."""
        return ()

    def epoch(self, epoch: int, members: Sequence[int]) -> Iterator[Any]:
        """See `Batches.epoch`; a sampler with ``set_epoch`` is told the epoch."""
        for sampler in _samplers(self._loader):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)
        batch = None
        for batch in self._loader:
            yield to_device(batch, self._device)
        if batch is None:
            raise ValueError(
                f"data: the loader gave no minibatch in epoch {epoch}; its dataset has to begin"
                f" anew each time that it is iterated"
            )


class LoadedInOrder:
    """The minibatches of a loader, each time that this is iterated.

    Args:
        loader: The loader.
        device: Where the minibatches are to lie; None for where they are loaded.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device | None) -> None:
        self._loader = loader
        self._device = device

    def __iter__(self) -> Iterator[Any]:
        return (to_device(batch, self._device) for batch in self._loader)


def to_device(batch: Any, device: torch.device | None) -> Any:
    """Move the tensors of a minibatch without waiting; the rest is passed through."""
    if device is None:
        return batch
    return tree_map(
        lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch
    )


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    """What chooses the rows of a loader, each once."""
    found = [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    return list({id(one): one for one in found if one is not None}.values())


def _with_sampler(
    loader: DataLoader[Any], sampler: StepSampler, generator: torch.Generator | None
) -> DataLoader[Any]:
    """A loader with the same options that takes its rows from another sampler."""
    with_workers = loader.num_workers > 0
    return DataLoader(
        loader.dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        pin_memory_device=loader.pin_memory_device,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if with_workers else None,
        generator=generator,
        prefetch_factor=loader.prefetch_factor if with_workers else None,
        persistent_workers=loader.persistent_workers,
        in_order=loader.in_order,
    )


def _by_member(batch: Any, n: int, size: int) -> Any:
    """Leaves of shape (N * B, *) as (N, B, *), marked."""
    return tree_map(
        lambda leaf: (
            per_member(torch.unflatten(leaf, 0, (n, size))) if isinstance(leaf, Tensor) else leaf
        ),
        batch,
    )
