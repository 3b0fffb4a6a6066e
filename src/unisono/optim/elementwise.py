"""Updates with one value per member: elementwise passes over blocks of members.

A block fits the cache, so that all passes but the first find it there. The coefficients are small
tensors of shape (K, N), computed on the host in float64 and brought to the device in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from unisono.optim.batch import Batch, Memory, as_real, cuts
from unisono.optim.hyperparameters import Array

# Elements of a block for each thread of a CPU. Smaller ones fit the second-level cache and are
# slower all the same, by the cost of starting an operation; 2**15 to 2**20 were timed.
BLOCK: Final = 2**18

Coefficients = Mapping[str, Array]
Scratch = tuple[Tensor, Tensor]
"""Two tensors of the shape and the order in memory of a block, whose content is nobody's."""

Passes = Callable[[Tensor, Tensor, Mapping[str, Tensor], Mapping[str, Tensor], Scratch], None]


@dataclass(frozen=True)
class Block:
    """Some members of one parameter, with views of its memory.

    Args:
        place: Which of the batch's parameters.
        start: The first of these members.
        stop: The one after the last.
        parameter: The members' rows.
        state: The rows of what is in the state, by key.
        scratch: Room for what is computed in between.
    """

    place: int
    start: int
    stop: int
    parameter: Tensor
    state: dict[str, Tensor]
    scratch: Scratch | None


class Cut:
    """A batch cut into blocks, with room for the coefficients.

    Args:
        batch: The batch.
        names: The names of the coefficients.
    """

    def __init__(self, batch: Batch, names: tuple[str, ...]) -> None:
        first = batch.parameters[0]
        self._names = names
        self._on_host = first.device.type == "cpu"
        dtype = np.float64 if first.dtype in (torch.float64, torch.complex128) else np.float32
        self._table = np.empty((len(names), batch.num_members), dtype=dtype)
        self._host = torch.from_numpy(self._table)
        self._device = first.device
        self._kept: list[dict[str, Tensor]] | None = None
        size = BLOCK * torch.get_num_threads() if self._on_host else None
        places = [
            (place, start, stop, _rows(parameter, start, stop))
            for place, parameter in enumerate(batch.parameters)
            for start, stop in cuts(parameter.shape, size)
        ]
        # On a CPU fresh memory of this size costs more than the passes that fill it: the same two
        # buffers serve all blocks. Elsewhere torch's allocator hands it out for nothing.
        largest = max(rows.numel() for _, _, _, rows in places)
        room = places[0][3].new_empty((2, largest)) if self._on_host else None
        self.blocks = [
            Block(
                place,
                start,
                stop,
                rows,
                {key: _rows(each[place], start, stop) for key, each in batch.state.items()},
                None if room is None else _like(room, rows),
            )
            for place, start, stop, rows in places
        ]

    def coefficients(self, values: Coefficients) -> list[dict[str, Tensor]]:
        """For each block its coefficients by name, in a shape that goes with its rows."""
        for k, name in enumerate(self._names):
            self._table[k] = values[name]
        if self._on_host:
            if self._kept is None:
                self._kept = self._views(self._host)
            return self._kept
        return self._views(self._host.to(self._device, non_blocking=True))

    def _views(self, table: Tensor) -> list[dict[str, Tensor]]:
        made: dict[tuple[int, int, int], dict[str, Tensor]] = {}
        found = []
        for block in self.blocks:
            axes = block.parameter.ndim - 1
            key = (block.start, block.stop, axes)
            if key not in made:
                rows = table.narrow(1, block.start, block.stop - block.start)
                rows = rows.view(*rows.shape, *[1] * axes)
                made[key] = dict(zip(self._names, rows.unbind(), strict=True))
            found.append(made[key])
        return found


def update(batch: Batch, passes: Passes, values: Coefficients, memory: Memory) -> None:
    """Run the passes over each block of a batch.

    Args:
        batch: What to update, in place.
        passes: A function of a block's parameter, gradient, state and coefficients.
        values: The coefficients by name; their shapes are (1) or (N).
        memory: Where the cut is kept from step to step.
    """
    names = tuple(values)
    key = ("cut", names, tuple(batch.state), batch.key)
    cut: Cut | None = None if batch.key is None else memory.recall(key, batch.tensors)
    if cut is None:
        cut = Cut(batch, names)
        if batch.key is not None:
            memory.remember(key, batch.tensors, cut)
    gradients = [as_real(gradient) for gradient in batch.gradients]
    for block, coefficients in zip(cut.blocks, cut.coefficients(values), strict=True):
        gradient = gradients[block.place]
        if block.stop - block.start < gradient.shape[0]:
            gradient = gradient.narrow(0, block.start, block.stop - block.start)
        scratch = block.scratch
        if scratch is None:
            scratch = torch.empty_like(block.parameter), torch.empty_like(block.parameter)
        passes(block.parameter, gradient, block.state, coefficients, scratch)


def descent(
    parameter: Tensor, gradient: Tensor, coefficients: Mapping[str, Tensor], room: Tensor
) -> Tensor:
    """The gradient to descend along: ``sign * g + decay * p``.

    Args:
        parameter: p, of one block.
        gradient: g; it is returned itself if there is nothing to do.
        coefficients: ``sign`` is -1 for members that maximize; ``decay`` is the weight decay;
            each is absent where no member needs it.
        room: Where the result is written to if it isn't g.
    """
    if "sign" in coefficients:
        gradient = torch.mul(gradient, coefficients["sign"], out=room)
    if "decay" in coefficients:
        gradient = torch.addcmul(gradient, parameter, coefficients["decay"], out=room)
    return gradient


def _rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return as_real(tensor.detach()).narrow(0, start, stop - start)


def _like(room: Tensor, rows: Tensor) -> Scratch:
    """Two views of the same memory each time, in the shape and the order of these rows."""
    first, second = (
        own.as_strided(rows.shape, rows.stride(), own.storage_offset()) for own in room
    )
    return first, second
