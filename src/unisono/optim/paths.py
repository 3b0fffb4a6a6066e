"""How a batch is updated: which of the ways to the same numbers is taken."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import numpy as np
import torch
from torch import Tensor

from unisono.optim import elementwise
from unisono.optim.batch import Batch, Memory, as_stored, in_order
from unisono.optim.elementwise import Scratch
from unisono.optim.fused import Tensors
from unisono.optim.hyperparameters import Array, Hyperparameter, Steps, Values

# Elements of a member from which one call of a fused kernel per member costs less than elementwise
# passes over all of them. A call takes some 8 us; the passes take 2 to 3 times as long per element.
LARGE_MEMBER: Final = 8192


class Method(ABC):
    """The update of one kind of optimizer; it holds nothing, all state is in the `Batch`.

    Attributes:
        name: The name of the optimizer.
        hyperparameters: In the order in which the optimizer takes them.
    """

    name: ClassVar[str]
    hyperparameters: ClassVar[tuple[Hyperparameter, ...]]

    def problems(self, values: Mapping[str, Any]) -> list[str]:
        """What is wrong in the values of one member beside each of them by itself."""
        return []

    @abstractmethod
    def has_kernel(self, parameters: list[Tensor]) -> bool:
        """Whether torch has a fused kernel that takes these parameters."""

    @abstractmethod
    def moments(self, values: Values) -> tuple[str, ...]:
        """The keys of the state that the values call for, beside ``step``."""

    @abstractmethod
    def counted(self, values: Values) -> Array:
        """For each member 1 if a step counts in ``step``, else 0; of shape (1) or (N)."""

    @abstractmethod
    def phase(self, steps: Steps) -> Steps:
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
        scratch: Scratch,
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
    can_fuse = method.has_kernel(batch.parameters)
    is_equal = can_fuse and _agree(method, batch, active)
    if can_fuse and not is_equal and batch.elements >= LARGE_MEMBER:
        members = range(batch.num_members) if active is None else active
        _update_each(method, batch, members, memory)
        return
    # Halves are updated in float32, and rounded once, as torch's kernels do it.
    is_half = batch.parameters[0].dtype in (torch.float16, torch.bfloat16)
    wide = torch.float32 if is_half and not is_equal else None
    if active is not None or wide is not None:
        members = list(range(batch.num_members) if active is None else active)
        some = batch.members(members, wide)
        update(method, some, None, memory)
        batch.put_back(members, some)
    elif is_equal:
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
    parameters = _stored(batch.parameters, batch)
    state = {key: _stored(tensors, batch) for key, tensors in batch.state.items()}
    method.fused(parameters, _gradients(batch), state, batch.values, 0, float(batch.steps[0]))


def _update_each(method: Method, batch: Batch, members: Sequence[int], memory: Memory) -> None:
    """One call of the kernel for each member, on views of its rows."""
    key = ("members", tuple(batch.state), batch.key)
    views: _Views | None = None if batch.key is None else memory.recall(key, batch.tensors)
    if views is None:
        views = (
            _by_member(_stored(batch.parameters, batch)),
            {k: _by_member(_stored(tensors, batch)) for k, tensors in batch.state.items()},
        )
        if batch.key is not None:
            memory.remember(key, batch.tensors, views)
    parameters, state = views
    gradients = _by_member(_gradients(batch))
    done = batch.steps.tolist()
    for i in members:
        own = {name: tensors[i] for name, tensors in state.items()}
        method.fused(parameters[i], gradients[i], own, batch.values, i, done[i])


def _gradients(batch: Batch) -> list[Tensor]:
    """The gradients as the kernels read them: by address, like the parameters."""
    pairs = zip(batch.gradients, batch.parameters, strict=True)
    return _stored([in_order(gradient, parameter) for gradient, parameter in pairs], batch)


def _stored(tensors: Sequence[Tensor], batch: Batch) -> list[Tensor]:
    return [as_stored(t, p) for t, p in zip(tensors, batch.parameters, strict=True)]


_Rows = list[tuple[Tensor, ...]]
_Views = tuple[_Rows, dict[str, _Rows]]


def _by_member(tensors: Sequence[Tensor]) -> _Rows:
    """For each member its rows of all tensors."""
    return list(zip(*[tensor.unbind() for tensor in tensors], strict=True))
