"""How good the members are on data that they don't train on, each by itself and together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unisono.engine.parts import join_trees
from unisono.engine.tree import tree_map
from unisono.ensemble import Ensemble
from unisono.training.combined import Combine
from unisono.training.history import Array
from unisono.training.history import Validation as Validation
from unisono.training.losses import member_losses
from unisono.training.running import Running
from unisono.training.steps import Recipe, batch_size, call, pair, sum_dtype

Metric = Callable[[Any, Any], Tensor]


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
    def measure(self, running: Running) -> Validation:
        """Losses and metrics of the members that train, and of all together.

        Args:
            running: The members that train; they are in eval mode meanwhile.
        """
        ens, n = running.ens, len(running.whole)
        known = {i for members, _ in self._kept for i in members}
        if stopped := sorted(set(range(n)) - set(running.members) - known):
            self._keep(running.whole, stopped)
        names = ["", *self.metrics]
        own = {name: _Mean() for name in names}
        joint = {name: _Mean() for name in names}
        ens.eval()
        for k, (inputs, targets) in enumerate(map(pair, self.batches)):
            size = batch_size(targets)
            with self.recipe.precision(next(ens.parameters()).device):
                outputs = call(ens, inputs)
                everyone = self._with_stopped(outputs, running.members, k)
                combined = tree_map(_first_axis, self.combine(everyone))
                for name, fn in {"": self.recipe.loss, **self.metrics}.items():
                    own[name].add(member_losses(fn, outputs, targets), size)
                    joint[name].add(member_losses(fn, combined, targets), size)
        ens.train()
        values = {name: _spread_out(mean.value(), running.members, n) for name, mean in own.items()}
        together = {name: float(mean.value()[0]) for name, mean in joint.items()}
        return Validation(values.pop(""), values, together.pop(""), together)

    def _keep(self, whole: Ensemble, members: list[int]) -> None:
        some = whole[members].eval()
        with self.recipe.precision(next(whole.parameters()).device):
            self._kept.append(
                (members, [call(some, inputs) for inputs, _ in map(pair, self.batches)])
            )

    def _with_stopped(self, outputs: Any, members: list[int], k: int) -> Any:
        """The outputs of all members for minibatch k, in their order."""
        if not self._kept:
            return outputs
        trees = [outputs, *(kept[k] for _, kept in self._kept)]
        joined = join_trees("the output", trees, torch.cat)
        order = [*members, *(i for some, _ in self._kept for i in some)]
        places = torch.tensor(np.argsort(order).tolist())
        return tree_map(
            lambda leaf: leaf[places.to(leaf.device)] if isinstance(leaf, Tensor) else leaf, joined
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


def _spread_out(values: Array, members: list[int], n: int) -> Array:
    """Values of some members among NaN for the others."""
    found = np.full(n, np.nan)
    found[members] = values
    return found
