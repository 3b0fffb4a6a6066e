"""How good the members are on data that they don't train on, each by itself and together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.collectives import gather_rows
from unisono.engine.parts import join_trees
from unisono.engine.tree import tree_map
from unisono.training.combined import Combine, OverRanks
from unisono.training.history import Array
from unisono.training.history import Validation as Validation
from unisono.training.in_step import InStep
from unisono.training.losses import member_losses
from unisono.training.running import Running
from unisono.training.steps import Recipe, batch_size, call, pair, sum_dtype

Metric = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Measured:
    """What one rank has measured.

    Args:
        members: The members that train there.
        values: Their losses under the name "", and their metrics.
        combined: Loss and metrics of all members' combined prediction.
    """

    members: Sequence[int]
    values: Mapping[str, Array]
    combined: Mapping[str, float]


def validation_of(found: Sequence[Measured], num_members: int) -> Validation:
    """Put together what all ranks have measured.

    Args:
        found: Of each block.
        num_members: N.
    """
    names = list(found[0].values)
    values = {name: np.full(num_members, np.nan) for name in names}
    for part in found:
        for name in names:
            values[name][list(part.members)] = part.values[name]
    combined = dict(found[0].combined)
    return Validation(values.pop(""), values, combined.pop(""), combined)


@dataclass
class Validator:
    """Measures loss and metrics on one set of data.

    Outputs of members that have stopped don't change any more; they are computed once and kept.

    Args:
        batches: Minibatches, pairs (inputs, targets), the same each time it is iterated.
        recipe: Loss and precision.
        metrics: Name -> function of an output and a target, averaged over the rows.
        combine: Makes one prediction from those of the members.
    """

    batches: Iterable[Any]
    recipe: Recipe
    metrics: Mapping[str, Metric]
    combine: Combine
    # Members that stopped together, and their outputs for each minibatch.
    _kept: list[tuple[list[int], list[Any]]] = field(default_factory=list)

    @torch.no_grad()
    def measure(self, running: Running) -> Measured:
        """Losses and metrics of the members that train here, and of all members together.

        Args:
            running: The members that train; they are in eval mode meanwhile.
        """
        ens = running.ens
        known = {i for members, _ in self._kept for i in members}
        if stopped := sorted(set(running.held_here) - set(running.members) - known):
            self._keep(running, stopped)
        names = ["", *self.metrics]
        own = {name: _Mean() for name in names}
        joint = {name: _Mean() for name in names}
        ens.eval()
        with self._in_step(running) as before_combining:
            for k, (inputs, targets) in enumerate(map(pair, self.batches)):
                size = batch_size(targets)
                with self.recipe.precision(next(ens.parameters()).device):
                    outputs = None if running.is_idle else call(ens, inputs)
                    here = self._with_stopped(outputs, running, k)
                    before_combining()
                    combined = tree_map(_first_axis, self._combined(here, running))
                    for name, fn in {"": self.recipe.loss, **self.metrics}.items():
                        if not running.is_idle:
                            own[name].add(member_losses(fn, outputs, targets), size)
                        joint[name].add(member_losses(fn, combined, targets), size)
        ens.train()
        members = running.members
        values = {n: mean.value() if members else np.empty(0) for n, mean in own.items()}
        together = {name: float(mean.value()[0]) for name, mean in joint.items()}
        return Measured(members, values, together)

    @contextmanager
    def _in_step(self, running: Running) -> Iterator[Callable[[], object]]:
        """Keeps the ranks in step: gives what to call before they combine their outputs."""
        group = running.ranks.group
        if group is None:
            yield lambda: None
            return
        in_step = InStep(group)
        with in_step.until_end():
            yield in_step.next

    def _keep(self, running: Running, members: list[int]) -> None:
        some = running.home[running.ranks.at_home(members)].eval()
        with self.recipe.precision(next(some.parameters()).device):
            self._kept.append(
                (members, [call(some, inputs) for inputs, _ in map(pair, self.batches)])
            )

    def _with_stopped(self, outputs: Any, running: Running, k: int) -> Any:
        """The outputs of all members of this rank for minibatch k, in the order `_order` has."""
        if not self._kept:
            return outputs
        trees = [] if running.is_idle else [outputs]
        trees += [kept[k] for _, kept in self._kept]
        return join_trees("the output", trees, torch.cat)

    def _combined(self, here: Any, running: Running) -> Any:
        """The prediction of all members, from the outputs of those here."""
        ranks, order = running.ranks, self._order(running)
        if ranks.group is None:
            return self.combine(_in_order(here, order))
        if isinstance(self.combine, OverRanks):
            return self.combine.of_parts(here, ranks.block.num_members, ranks.group)
        every = [i for own in ranks.first_replicas(ranks.gather(order)) for i in own]
        group = ranks.group
        gathered = tree_map(
            lambda leaf: gather_rows(leaf, group) if isinstance(leaf, Tensor) else leaf, here
        )
        return self.combine(_in_order(gathered, every))

    def _order(self, running: Running) -> list[int]:
        """The members whose outputs this rank has."""
        return [*running.members, *(i for some, _ in self._kept for i in some)]


def _in_order(outputs: Any, order: list[int]) -> Any:
    """The outputs by ascending members.

    Args:
        outputs: A tree of tensors with the member axis in front.
        order: Their members.
    """
    if order == sorted(order):
        return outputs
    places = torch.tensor(np.argsort(order).tolist())
    return tree_map(
        lambda leaf: leaf[places.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, outputs
    )


class _Mean:
    """A mean weighted by rows, which stays on the device until it is asked for."""

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self._rows = 0

    def add(self, values: Tensor, rows: int) -> None:
        self._total = self._total + values.to(sum_dtype(values.device)) * rows
        self._rows += rows

    def value(self) -> Array:
        if not isinstance(self._total, Tensor):
            raise ValueError("fit: the validation data have no rows")
        found: Array = (self._total / self._rows).cpu().numpy()
        return found


def _first_axis(leaf: Any) -> Any:
    """The combined prediction as that of the one member of an ensemble."""
    return leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf
