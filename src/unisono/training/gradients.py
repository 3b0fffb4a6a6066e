"""Gradients of which several ranks have a part: summed before each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from unisono.block import DATA, Block
from unisono.engine.inputs import PerMember, per_member
from unisono.engine.tree import tree_map
from unisono.ensemble import Ensemble
from unisono.training.in_step import InStep


class SummedGradients:
    """The gradients of the parameters that other ranks have, too: ``grad = sum over ranks``.

    Those of a block's own members are summed over its replicas, each of which has the gradient of
    its rows, weighted by their part of the minibatch (see `rows_of_replica`). Those of what all
    members share are summed over all ranks. Each is sent once in a step.

    Unlike `unisono.distributed.Synchronised` it sends nothing before the backward pass is over. In
    turn a rank that fails is heard of at once, replicas may have different numbers of rows, and
    parameters may be without a gradient.

    Args:
        ens: What this rank trains.
        block: Its place.
    """

    def __init__(self, ens: Ensemble, block: Block) -> None:
        assert block.mesh is not None
        own, shared = trained_parameters(ens)
        self._parameters: list[nn.Parameter] = []
        self._sums: list[tuple[ProcessGroup | None, range]] = []
        group: ProcessGroup | None = None
        if block.num_replicas > 1:
            group = block.mesh.get_group(DATA)
            self._add(group, own)
        if shared:
            group = dist.group.WORLD
            self._add(group, shared)
        self._in_step = InStep(group, len(self._parameters))

    @contextmanager
    def until_end(self) -> Iterator[None]:
        """The steps of an epoch happen in here; see `InStep`."""
        with self._in_step.until_end():
            yield

    def sum(self) -> None:
        """Sum the gradients; where no rank has one, there is none.

        Raises:
            ElsewhereError: If another rank can't.
        """
        known = self._in_step.next([p.grad is not None for p in self._parameters])
        for group, places in self._sums:
            chosen = [self._parameters[k] for k in places if known[k]]
            for p in chosen:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            gradients = [p.grad for p in chosen if p.grad is not None]
            for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
                _sum_([gradient for gradient in gradients if gradient.dtype == dtype], group)

    def _add(self, group: ProcessGroup | None, parameters: Sequence[nn.Parameter]) -> None:
        start = len(self._parameters)
        self._parameters += parameters
        self._sums.append((group, range(start, len(self._parameters))))


def is_summed(ens: Ensemble, block: Block) -> bool:
    """Whether another rank has a part of any gradient."""
    return block.num_replicas > 1 or (block.num_places > 1 and bool(trained_parameters(ens)[1]))


def trained_parameters(ens: Ensemble) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters with a gradient: those of the members, and those that all share."""
    trained = [(name, p) for name, p in ens.members.named_parameters() if p.requires_grad]
    own = [p for name, p in trained if name not in ens.shared]
    return own, [p for name, p in trained if name in ens.shared]


def rows_of_replica(batch: Any, size: int, block: Block) -> tuple[Any, float]:
    """The rows of a minibatch that are a replica's own, and their part of all.

    Where there are fewer rows than replicas, some take a row of another with the weight 0.

    Args:
        batch: A tree; tensors with another number of rows are passed through.
        size: The rows of the minibatch, as one member sees them.
        block: The place of the replica.

    Shape:
        - batch: (B, *), or (N, B, *) where marked by `per_member`
    """
    start, stop = (size * r // block.num_replicas for r in (block.replica, block.replica + 1))
    weight = (stop - start) / size
    if start == stop:
        start, stop = 0, 1

    def cut(leaf: Any, axis: int) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() > axis and leaf.shape[axis] == size:
            return leaf.narrow(axis, start, stop - start)
        return leaf

    def own(leaf: Any) -> Any:
        if isinstance(leaf, PerMember):
            return per_member(tree_map(lambda inner: cut(inner, 1), leaf.tree))
        return cut(leaf, 0)

    return tree_map(own, batch), weight


@torch.no_grad()
def same_buffers(ens: Ensemble, block: Block) -> None:
    """Give the buffers of all replicas the values of the first."""
    if block.num_replicas == 1 or block.mesh is None:
        return
    for buffer in ens.members.buffers():
        value = buffer.detach().contiguous()
        dist.broadcast(value, group=block.mesh.get_group(DATA), group_src=0)
        buffer.copy_(value)


def _sum_(gradients: list[Tensor], group: ProcessGroup | None) -> None:
    """Sum tensors of one dtype, in place, in one message."""
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))
