"""One epoch of optimizer steps, for all members at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from unisono.engine.inputs import PerMember
from unisono.engine.tree import leaves
from unisono.ensemble import Ensemble
from unisono.training.clipping import clip_grad_norm_
from unisono.training.gradients import rows_of_replica
from unisono.training.losses import member_losses
from unisono.training.running import Running


@dataclass(frozen=True)
class Recipe:
    """How a step is done.

    Args:
        loss: ``loss(output, target)`` of one member's output.
        accumulate: Minibatches for each optimizer step.
        max_grad_norm: The norm that a member's gradient is clipped to; None for no clipping.
        autocast: The dtype of `torch.autocast`; None for none.
    """

    loss: Callable[[Any, Any], Tensor]
    accumulate: int = 1
    max_grad_norm: float | Sequence[float] | None = None
    autocast: torch.dtype | None = None

    def precision(self, device: torch.device) -> AbstractContextManager[Any]:
        """The context that forward and loss run in."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)

    def for_members(self, members: Sequence[int]) -> Recipe:
        """The recipe for some of the members, by their places at home."""
        norm = self.max_grad_norm
        if norm is None or isinstance(norm, float | int):
            return self
        own = [float(norm[i]) for i in members]
        return Recipe(self.loss, self.accumulate, own, self.autocast)


def train_epoch(
    running: Running,
    batches: Iterable[Any],
    recipe: Recipe,
    *,
    after_step: Callable[[], None],
    after_batch: Callable[[], None],
) -> tuple[Tensor, Tensor, int]:
    """Take every minibatch of an epoch; the gradients of ``accumulate`` of them make a step.

    Args:
        running: The members that train.
        batches: Pairs (inputs, targets).
        recipe: How a step is done.
        after_step: Called after each step of the optimizer.
        after_batch: Called after each minibatch.

    Returns:
        Each member's mean loss, of replicas this one's part of it, and whether all its losses were
        numbers, neither of them read from the device; and the rows that a member saw.

    Shape:
        - losses, numbers: (N) for N members that train
    """
    ens, optimizer, gradients = running.ens, running.optimizer, running.gradients
    block = running.ranks.block
    recipe = recipe.for_members(running.ranks.at_home(running.members))
    device = next(ens.parameters()).device
    total = torch.zeros(len(ens), dtype=sum_dtype(device), device=device)
    finite = torch.ones(len(ens), dtype=torch.bool, device=device)
    rows = 0
    optimizer.zero_grad()
    with nullcontext() if gradients is None else gradients.until_end():
        for group in _groups(batches, recipe.accumulate):
            for inputs, targets in map(pair, group):
                size, weight = batch_size(targets), 1.0
                rows += size
                if block.num_replicas > 1:
                    (inputs, targets), weight = rows_of_replica((inputs, targets), size, block)
                with recipe.precision(device):
                    losses = member_losses(recipe.loss, call(ens, inputs), targets)
                # The sum, so that each member gets the gradient of its own loss.
                torch.autograd.backward(losses.sum() * weight / len(group))
                total += losses.detach() * (size * weight)
                finite &= losses.detach().isfinite()
                after_batch()
            if gradients is not None:
                gradients.sum()
            if recipe.max_grad_norm is not None:
                clip_grad_norm_(ens, recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            after_step()
    return total / max(rows, 1), finite, rows


def pair(batch: Any, caller: str = "fit") -> tuple[Any, Any]:
    """Inputs and targets of a minibatch.

    Args:
        batch: What the data give.
        caller: The function that the user called, for the message.

    Raises:
        TypeError: If it is anything else.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
    raise TypeError(
        f"{caller}: the data are pairs (inputs, targets), but a minibatch is a"
        f" {type(batch).__name__}{size}; several inputs go into one: ((x1, x2), y)"
    )


def call(ens: Ensemble, inputs: Any) -> Any:
    """``ens(inputs)``; a tuple or list is several arguments, a dict is keyword arguments."""
    if isinstance(inputs, tuple | list):
        return ens(*inputs)
    if isinstance(inputs, Mapping):
        return ens(**inputs)
    return ens(inputs)


def batch_size(targets: Any) -> int:
    """Rows of a minibatch, as one member sees it."""
    for _, leaf in leaves(targets):
        if isinstance(leaf, PerMember):
            return next(x.shape[1] for _, x in leaves(leaf.tree) if isinstance(x, Tensor))
        if isinstance(leaf, Tensor):
            return leaf.shape[0]
    raise TypeError("fit: the targets hold no tensor; a minibatch is a pair (inputs, targets)")


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype that losses are added up in: the widest that the device has."""
    return torch.float32 if device.type == "mps" else torch.float64


def _groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` minibatches; the last one may be shorter."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group
