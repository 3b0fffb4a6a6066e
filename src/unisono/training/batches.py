"""Minibatches for N members at once: from tensors on a device, a `Dataset` or a `DataLoader`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from unisono.training.draws import Draws, check_batch_size, split_evenly, split_with_rest
from unisono.training.kinds import Rows, Sampling
from unisono.training.loader_checks import check_loader, dataset_length
from unisono.training.loading import DatasetBatches, LoadedInOrder, LoaderBatches
from unisono.training.sampling import as_sampling
from unisono.training.tensors import TensorBatches, TensorSlices, as_tensors


class Batches(Protocol):
    """Minibatches of each epoch; epoch k is the same whatever ran before."""

    @property
    def num_steps(self) -> int | None:
        """Minibatches of an epoch; None if a loader doesn't know it."""

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """Rows of each minibatch, as one member sees them; None if a loader decides on them."""

    @property
    def generators(self) -> tuple[torch.Generator, ...]:
        """The caller's own generators that are drawn from.

        To resume a training, save and restore their state.

        Beside them, a caller's own loader without a generator draws from torch's global one.
        """

    def held_out(self) -> tuple[Rows, ...]:
        """The rows that each member of the whole ensemble never sees; () for a caller's loader."""

    def epoch(self, epoch: int, members: Sequence[int]) -> Iterator[Any]:
        """The minibatches of one epoch, as trees of the structure of the data.

        Args:
            epoch: Number of the epoch, counted from 0.
            members: Indices of the members that train, in the whole ensemble.

        Shape:
            - leaves: (N, B, *) marked by `per_member` for ``N = len(members)``, or (B, *) without
              a mark where all members share the minibatch
        """


def make_batches(
    data: Any,
    *,
    batch_size: int | None,
    sampling: str | Sampling,
    seed: int,
    num_members: int,
    device: torch.device | str | None = None,
) -> Batches:
    """Make the minibatches that members are trained on.

    ``x[i] == data[order[i]]`` for the part of ``sampling.order(...)`` that belongs to the step.

    Tensors are moved to the device once and as a whole, so are numpy arrays (of the same dtype) and
    the tensors of a `TensorDataset`; each step is one gather for all members. Rows of any other
    `Dataset` are loaded step by step: its minibatch has N * B rows, a row that several members draw
    is loaded for each. The options of a `DataLoader` are taken over: dataset, batch size,
    ``drop_last``, ``collate_fn``, workers, pinning. With ``sampling="shared"`` it is iterated as it
    is, with its own sampler.

    The minibatches of an epoch differ in size by one row at most, instead of one small rest at the
    end. Those of a `DataLoader` are as it would make them itself.

    Args:
        data: A tree (tensor, tuple, dict ...) of tensors or arrays with equal first axis, a
            `Dataset`, or a `DataLoader`.
        batch_size: Rows of a minibatch for each member, at most; None for all rows. A `DataLoader`
            has its own, so there it is None or the same.
        sampling: A name, or what a function of `unisono.training.sampling` returns.
        seed: Seed of all orders.
        num_members: Number of members of the whole ensemble.
        device: Where the minibatches are to lie; None for where the data lie.

    Returns:
        The minibatches.

    Shape:
        - data: (rows, *) for each leaf
        - minibatches: (N, B, *) marked by `per_member`, or (B, *) for ``sampling="shared"``

    Raises:
        ValueError: If an argument is out of range, or lengths don't agree.
        TypeError: If the data are of another kind, or can't be sampled like this.

    Example:
        >>> x, y = torch.arange(10.0), torch.arange(10)
        >>> batches = make_batches((x, y), batch_size=4, sampling="shuffled", seed=0, num_members=3)
        >>> batches.sizes
        (4, 3, 3)
        >>> for inputs, targets in batches.epoch(0, members=[0, 1, 2]):
        ...     print(inputs.tree.shape, bool((inputs.tree == targets.tree).all()))
        torch.Size([3, 4]) True
        torch.Size([3, 3]) True
        torch.Size([3, 3]) True
    """
    sampling = as_sampling(sampling)
    batch_size = check_batch_size(batch_size)
    place = None if device is None else torch.device(device)

    def draws(num_rows: int) -> Draws:
        sampling.check(num_rows, num_members=num_members)
        per_epoch = sampling.rows_per_epoch(num_rows, num_members=num_members)
        if isinstance(data, DataLoader):
            assert data.batch_size is not None  # see check_loader
            sizes = split_with_rest(per_epoch, data.batch_size, drop_last=data.drop_last)
        else:
            sizes = split_evenly(per_epoch, batch_size)
        return Draws(sampling, num_rows, num_members, seed, sizes)

    if isinstance(data, DataLoader):
        _check_own_size("data", data, batch_size)
        if sampling.is_shared:
            return LoaderBatches(data, place)
        return DatasetBatches(data, draws(check_loader(data, sampling)), place)
    given = _tensors_inside(data)
    if _is_dataset("data", given):
        pin = place is not None and place.type == "cuda" and torch.cuda.is_available()
        loader = DataLoader(given, pin_memory=pin)
        return DatasetBatches(loader, draws(dataset_length("data", given)), place)
    tensors, num_rows = as_tensors("data", given, place)
    return TensorBatches(tensors, draws(num_rows))


def make_validation_batches(
    data: Any,
    *,
    batch_size: int | None,
    device: torch.device | str | None = None,
    name: str = "validation",
) -> Iterable[Any]:
    """Make the minibatches that all members are measured on: all rows, in order.

    ``torch.cat(list of x) == data``. Minibatches of tensors are views of them. A `DataLoader` is
    iterated as it is. The result can be iterated any number of times.

    Args:
        data: As for `make_batches`.
        batch_size: Rows of a minibatch, at most; None for all rows. A `DataLoader` has its own.
        device: Where the minibatches are to lie; None for where the data lie.
        name: What the data are, for messages.

    Returns:
        The minibatches.

    Shape:
        - data: (rows, *) for each leaf
        - minibatches: (B, *), seen by all members

    Raises:
        ValueError: If an argument is out of range, or lengths don't agree.
        TypeError: If the data are of another kind.

    Example:
        >>> batches = make_validation_batches(torch.arange(5), batch_size=3)
        >>> list(batches)
        [tensor([0, 1, 2]), tensor([3, 4])]
    """
    batch_size = check_batch_size(batch_size)
    place = None if device is None else torch.device(device)
    if isinstance(data, DataLoader):
        _check_own_size(name, data, batch_size)
        return LoadedInOrder(data, place)
    given = _tensors_inside(data)
    if _is_dataset(name, given):
        rows = dataset_length(name, given)
        # A generator of its own: measuring must not change the random numbers of training.
        own = torch.Generator()
        return LoadedInOrder(DataLoader(given, batch_size or rows, generator=own), place)
    tensors, num_rows = as_tensors(name, given, place)
    return TensorSlices(tensors, split_evenly(num_rows, batch_size))


def _check_own_size(name: str, loader: DataLoader[Any], batch_size: int | None) -> None:
    if batch_size not in (None, loader.batch_size):
        raise ValueError(
            f"{name}: a DataLoader makes minibatches of its own batch_size={loader.batch_size};"
            f" got batch_size={batch_size} besides. Leave one of them out: batch_size=None"
        )


def _tensors_inside(data: Any) -> Any:
    """The tensors of a `TensorDataset`, and of a part of one as `random_split` makes it."""
    if type(data) is TensorDataset:
        return data.tensors
    if type(data) is Subset and type(data.dataset) is TensorDataset:
        rows = torch.as_tensor(data.indices, dtype=torch.int64)
        return tuple(x.index_select(0, rows.to(x.device)) for x in data.dataset.tensors)
    return data


def _is_dataset(name: str, data: Any) -> bool:
    """Whether rows are to be loaded by index; other libraries' data sets are no `Dataset`."""
    if isinstance(data, IterableDataset):
        raise TypeError(
            f"{name}: {type(data).__name__} is an IterableDataset, which has no rows by index; give"
            f" it in a loader, whose minibatches all members share:\n\n"
            f"    DataLoader(dataset, batch_size=...)"
        )
    if isinstance(data, Dataset):
        return True
    is_tree = isinstance(data, Tensor | np.ndarray | tuple | list | str | MutableMapping)
    is_tree = is_tree or dataclasses.is_dataclass(data)
    return not is_tree and hasattr(data, "__getitem__") and hasattr(data, "__len__")
