"""How a batch is updated: which of the ways to the same numbers is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from unisono.optim import elementwise
from unisono.optim.batch import Batch, Memory, in_order
from unisono.optim.fused import Tensors, has_kernel
from unisono.optim.hyperparameters import Array, Hyperparameter, Values

# Elements of a member from which one call of a fused kernel per member costs less than elementwise
# passes over all of them. A call takes some 8 us; the passes take 2 to 3 times as long per element.
LARGE_MEMBER: Final = 8192


class Method(ABC):
    """The update of one kind of optimizer; it holds nothing, all state is in the `Batch`.

    Attributes:
        name: The name of the optimizer.
        hyperparameters: In the order in which the optimizer takes them.
        has_kernel: Whether torch has a fused kernel for it.
    """

    name: ClassVar[str]
    hyperparameters: ClassVar[tuple[Hyperparameter, ...]]
    has_kernel: ClassVar[bool]

    def problems(self, values: Mapping[str, Any]) -> list[str]:
        """What is wrong in the values of one member beside each of them by itself."""
        return []

    @abstractmethod
    def moments(self, values: Values) -> tuple[str, ...]:
        """The keys of the state that the values call for, beside ``step``."""

    @abstractmethod
    def counted(self, values: Values) -> Array:
        """For each member 1 if a step counts in ``step``, else 0; of shape (1) or (N)."""

    @abstractmethod
    def phase(self, steps: Array) -> Array:
        """What of the number of steps done has a part in the update."""

    @abstractmethod
    def coefficients(self, values: Values, steps: Array) -> dict[str, Array]:
        """The coefficients of `passes`, of shape (1) or (N); those that nobody needs are absent."""

    @abstractmethod
    def passes(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        coefficients: Mapping[str, Tensor],
    ) -> None:
        """Update one block of members in place, each with its own coefficients."""

    def fused(
        self,
        parameters: Tensors,
        gradients: Tensors,
        state: Mapping[str, Tensors],
        values: Values,
        member: int,
        done: float,
    ) -> None:
        """Update with torch's kernel, with the values of one member that has ``done`` steps."""
        raise NotImplementedError(f"{self.name} has no fused kernel")


def update(method: Method, batch: Batch, active: Sequence[int] | None, memory: Memory) -> None:
    """Update a batch in place.

    Args:
        method: The kind of optimizer.
        batch: The parameters with all they need.
        active: The members to update; None for all. The others aren't read nor written.
        memory: What is kept from step to step.
    """
    can_fuse = method.has_kernel and all(map(has_kernel, batch.parameters))
    if can_fuse and batch.elements >= LARGE_MEMBER and not _agree(method, batch, active):
        members = range(batch.num_members) if active is None else active
        _update_each(method, batch, members, memory)
        return
    wide = batch.parameters[0].dtype in (torch.float16, torch.bfloat16) and not can_fuse
    if active is not None or wide:
        members = list(range(batch.num_members) if active is None else active)
        # Halves are updated in float32, and rounded once, as torch's kernels do it.
        some = batch.members(members, torch.float32 if wide else None)
        update(method, some, None, memory)
        batch.put_back(members, some)
    elif can_fuse and _agree(method, batch, None):
        _update_all(method, batch)
    else:
        coefficients = method.coefficients(batch.values, batch.steps)
        elementwise.update(batch, method.passes, coefficients, memory)


def _agree(method: Method, batch: Batch, active: Sequence[int] | None) -> bool:
    """Whether all active members have the same hyperparameters and are in step."""
    phase = method.phase(batch.steps)
    if active is not None:
        return batch.values.of(active).equal and bool(np.all(phase[active] == phase[active[0]]))
    return batch.values.equal and bool(np.all(phase == phase[0]))


def _update_all(method: Method, batch: Batch) -> None:
    """One call of the kernel for all members."""
    pairs = zip(batch.gradients, batch.parameters, strict=True)
    gradients = [in_order(gradient, parameter) for gradient, parameter in pairs]
    method.fused(batch.parameters, gradients, batch.state, batch.values, 0, float(batch.steps[0]))


def _update_each(method: Method, batch: Batch, members: Sequence[int], memory: Memory) -> None:
    """One call of the kernel for each member, on views of its rows."""
    key = ("members", tuple(batch.state), batch.key)
    views: _Views | None = None if batch.key is None else memory.recall(key, batch.tensors)
    if views is None:
        views = _by_member(batch.parameters), {k: _by_member(t) for k, t in batch.state.items()}
        if batch.key is not None:
            memory.remember(key, batch.tensors, views)
    parameters, state = views
    pairs = zip(batch.gradients, batch.parameters, strict=True)
    gradients = _by_member([in_order(gradient, parameter) for gradient, parameter in pairs])
    done = batch.steps.tolist()
    for i in members:
        own = {name: tensors[i] for name, tensors in state.items()}
        method.fused(parameters[i], gradients[i], own, batch.values, i, done[i])


_Rows = list[tuple[Tensor, ...]]
_Views = tuple[_Rows, dict[str, _Rows]]


def _by_member(tensors: Sequence[Tensor]) -> _Rows:
    """For each member its rows of all tensors."""
    return list(zip(*[tensor.unbind() for tensor in tensors], strict=True))
