"""The state of an ensemble and its optimizer at one moment, to put members back to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unisono.ensemble import Ensemble
from unisono.rows import copy_rows
from unisono.training.running import shared_tensors, states_of


class Snapshot:
    """Copies of all tensors of an ensemble and of its optimizer's state.

    Args:
        ens: The ensemble.
        optimizer: An optimizer of its parameters.
    """

    def __init__(self, ens: Ensemble, optimizer: torch.optim.Optimizer) -> None:
        self._ens = ens
        self._optimizer = optimizer
        self._tensors = _copies(ens.stacked_tensors())
        self._shared = _copies(shared_tensors(ens))
        self._state = {key: state.clone() for key, state in states_of(optimizer)}
        self._shared_parameters = {id(tensor) for tensor in shared_tensors(ens).values()}

    @torch.no_grad()
    def restore(self, members: Sequence[int]) -> None:
        """Put these members and their optimizer state back, in place; the others stay."""
        copy_rows(self._ens.stacked_tensors(), members, self._tensors, members)
        for (parameter, key), state in states_of(self._optimizer):
            if parameter in self._shared_parameters:
                continue
            before = self._state.get((parameter, key))
            rows = torch.tensor(members, device=state.device)
            if before is None:  # made since; a member without a step has zeros
                state.index_fill_(0, rows, 0)
            else:
                state.index_copy_(0, rows, before.index_select(0, rows))

    @torch.no_grad()
    def restore_all(self) -> None:
        """Put everything back, also what all members share."""
        for now, before in (
            (self._ens.stacked_tensors(), self._tensors),
            (shared_tensors(self._ens), self._shared),
        ):
            for name, tensor in now.items():
                tensor.copy_(before[name])
        for address, state in states_of(self._optimizer):
            before_state = self._state.get(address)
            state.zero_() if before_state is None else state.copy_(before_state)


def finite_members(ens: Ensemble) -> Tensor:
    """For each member whether all its parameters are numbers.

    Shape:
        - returns: (N), of booleans
    """
    parameters = dict(ens.members.named_parameters())
    found = [
        parameters[name].detach().isfinite().flatten(1).all(1)
        for name in ens.stacked_tensors()
        if name in parameters
    ]
    return torch.stack(found).all(0)


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
