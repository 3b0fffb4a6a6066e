"""Minibatches of tensors that lie on a device as a whole: one gather for all members."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.engine.inputs import per_member
from unisono.engine.tree import leaves, tree_map
from unisono.training.draws import Draws
from unisono.training.kinds import Rows

SHOWN = 10  # problems of a long list


def as_tensors(name: str, data: Any, device: torch.device | None) -> tuple[Any, int]:
    """Return the data as a tree of tensors on the device, and the number of their rows.

    An array becomes a tensor of the same dtype, on the same memory if it is writeable.

    Args:
        name: What the data are, for the message.
        data: A tree of tensors and numpy arrays.
        device: Where they are to lie; None for where they are.

    Raises:
        ValueError: If they don't have the same number of rows, at least one.
        TypeError: If something else is among them.
    """
    data = tree_map(_from_array, data)
    found = list(leaves(data, name))
    others = [
        f"{path} is of type {type(leaf).__name__}"
        for path, leaf in found
        if not isinstance(leaf, Tensor)
    ]
    if others or not found:
        facts = listed(others) if others else f"  {name} holds nothing"
        raise TypeError(
            f"{name}: expected tensors or numpy arrays of numbers, with the rows on axis 0,"
            f" but:\n\n{facts}\n\n"
            f"Give tensors, or samples that are to be loaded and collated one by one:\n\n"
            f"    (x, y)                                     # tensors\n"
            f"    torch.utils.data.DataLoader(samples, ...)  # samples[i] is one row"
        )
    lengths = {leaf.shape[0] if leaf.dim() else None for _, leaf in found}
    if len(lengths) != 1 or lengths & {None, 0}:
        facts = listed([f"{path} has shape {tuple(leaf.shape)}" for path, leaf in found])
        raise ValueError(
            f"{name}: axis 0 of all tensors is the row, so it has the same length in all of them,"
            f" at least 1, but:\n\n{facts}"
        )
    moved = data if device is None else tree_map(lambda leaf: leaf.to(device), data)
    return moved, found[0][1].shape[0]


class TensorBatches:
    """Minibatches gathered from tensors: ``x.index_select(0, rows)``.

    Args:
        data: Tree of tensors with equal first axis.
        draws: The rows of each step.
    """

    generators: tuple[torch.Generator, ...] = ()

    def __init__(self, data: Any, draws: Draws) -> None:
        self._data = data
        self._draws = draws
        self._device = next(leaf.device for _, leaf in leaves(data))

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
        """See `Batches.epoch`."""
        steps = list(self._draws.steps(epoch, members))
        # Step by step in memory, so that each step's rows are one block: no copy before the gather.
        flat = torch.from_numpy(np.concatenate([rows.ravel() for rows in steps]))
        flat = flat.to(self._device, non_blocking=True)
        own = not self._draws.sampling.is_shared
        for index, rows in zip(
            torch.split(flat, [rows.size for rows in steps]), steps, strict=True
        ):
            yield _gather(self._data, index, rows.shape if own else None)


class TensorSlices:
    """All rows in order, in minibatches that are views.

    Args:
        data: Tree of tensors with equal first axis.
        sizes: Rows of each minibatch.
    """

    def __init__(self, data: Any, sizes: tuple[int, ...]) -> None:
        self._data = data
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for size in self.sizes:
            yield _narrow(self._data, start, size)
            start += size


def listed(problems: Sequence[str]) -> str:
    """The first problems, one in a line, and how many more there are."""
    more = len(problems) - SHOWN
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    return "\n".join([*lines, f"  ... and {more} more"] if more > 0 else lines)


def _gather(data: Any, index: Tensor, shape: tuple[int, ...] | None) -> Any:
    """Rows of every leaf: (N, B, *) with a mark for a shape (N, B), or else (B, *)."""

    def gather(leaf: Tensor) -> Any:
        taken = leaf.index_select(0, index)
        return taken if shape is None else per_member(torch.unflatten(taken, 0, shape))

    return tree_map(gather, data)


def _narrow(data: Any, start: int, size: int) -> Any:
    return tree_map(lambda leaf: leaf.narrow(0, start, size), data)


def _from_array(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray) or leaf.dtype.kind not in "biufc":
        return leaf
    # torch warns of read-only memory, and doesn't know negative strides.
    is_plain = leaf.flags.writeable and all(stride >= 0 for stride in leaf.strides)
    return torch.from_numpy(leaf if is_plain else leaf.copy())
