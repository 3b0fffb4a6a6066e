"""`MemberOptimizer`: a `torch.optim.Optimizer` with hyperparameters per member."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unisono.ensemble import Ensemble
from unisono.optim import groups as grouping
from unisono.optim import state as states
from unisono.optim.batch import Memory
from unisono.optim.checks import (
    active_members,
    check_chosen,
    check_ensemble,
    check_fits,
    check_loaded,
    check_not_captured,
    refuse_sparse,
)
from unisono.optim.collecting import collect, count
from unisono.optim.hyperparameters import PerMember, Reader, parse_all
from unisono.optim.paths import Method, update
from unisono.options import check_copies

Mask = Sequence[bool] | Tensor | NDArray[np.bool_]
Params = Any  # what `torch.optim` takes, which isn't public: tensors, named tensors, or groups


class MemberOptimizer(torch.optim.Optimizer):
    """Base of the optimizers of `unisono.optim`: training an ensemble is N solo trainings.

    Each hyperparameter is one value or one per member. If all are single values there is one param
    group, as for torch. As soon as one is given per member there are N: ``param_groups[i]`` is
    member i's, so that schedulers and users change single members. The first of them lists the
    parameters. Values are read from the groups in each step.

    ``state[p]`` holds the tensors of torch's namesake with a member axis, and ``"step"`` of shape
    (N), on the host, since members may stand at different steps.

    Args:
        ens: The ensemble.
        params: The parameters to train; None for all. Or what `torch.optim` takes: tensors, named
            tensors, or dictionaries with ``"params"`` and values of their own.
        values: The hyperparameters by name.

    Example:
        >>> from torch import nn
        >>> from unisono.optim import AdamW
        >>> optimizer = AdamW(Ensemble([nn.Linear(3, 1) for _ in range(2)]), lr=[0.1, 0.01])
        >>> isinstance(optimizer, MemberOptimizer), isinstance(optimizer, torch.optim.Optimizer)
        (True, True)
        >>> [(group["member"], len(group["params"])) for group in optimizer.param_groups]
        [(0, 2), (1, 0)]
    """

    method: ClassVar[Method]
    _ens: Ensemble

    def __init__(self, ens: Ensemble, params: Params, values: dict[str, Any]) -> None:
        name = type(self).__name__
        check_ensemble(name, ens)
        self._ens = ens
        self._forget()
        parsed, problems = parse_all(self.method.hyperparameters, values, len(ens))
        if problems:
            raise ValueError(f"{name}: " + "; ".join(problems))
        if params is None:
            is_per_member = any(isinstance(value, PerMember) for value in parsed.values())
            params = grouping.default_parameters(ens, own_only=is_per_member)
        super().__init__(params, parsed)
        ens.follow(self)

    @overload
    def step(self, closure: None = None, *, active: Mask | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, active: Mask | None = None) -> float: ...
    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, *, active: Mask | None = None
    ) -> float | None:
        """Update the parameters once.

        Args:
            closure: Computes the loss anew and returns it; for most uses not needed.
            active: A mask of N booleans; None for all members. Tensors and state of the others
                stay bitwise as they are, whatever their gradients. What all members share is
                updated as long as one is active. A mask on the host costs no waiting for a device.

        Returns:
            What the closure returns.

        Raises:
            ValueError: If the mask isn't N booleans.
            RuntimeError: If a gradient is sparse, or a CUDA graph is captured.

        Example:
            >>> from torch import nn
            >>> from unisono.optim import SGD
            >>> ens = Ensemble([nn.Linear(3, 1) for _ in range(2)])
            >>> optimizer = SGD(ens, lr=[0.1, 0.01])
            >>> ens(torch.ones(4, 3)).sum().backward()
            >>> optimizer.step(active=[False, True])
            >>> optimizer.state_dict()["param_groups"][1]["lr"]
            0.01
        """
        check_not_captured(type(self).__name__)
        members = active_members(type(self).__name__, active, len(self._ens))
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if members == []:
            return loss
        for place, groups in grouping.sections(self.param_groups, len(self._ens)):
            values = self._reader.read(place, groups)
            own, shared = self._with_gradient(groups[0]["params"])
            for parameters, n, chosen in ((own, len(self._ens), members), (shared, None, None)):
                if parameters:
                    for batch in collect(self.method, parameters, self.state, values, n):
                        update(self.method, batch, chosen, self._memory)
                    count(self.method, parameters, self.state, values, chosen)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with values of their own.

        Args:
            param_group: ``"params"``, and hyperparameters, each one value or one per member; those
                missing are the optimizer's. It becomes N groups if one is per member.

        Raises:
            TypeError: If it is no dictionary.
            ValueError: If a parameter isn't of the ensemble, or is shared by all members while a
                value is per member, or a value is out of bounds.
        """
        name = type(self).__name__
        groups = grouping.expand(name, self._ens, self.method, param_group, self.defaults)
        for group in groups:
            super().add_param_group(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, of this or of another process.

        A state of torch's namesake for ``ens.parameters()`` is taken too.

        Args:
            state_dict: The state.

        Raises:
            CheckpointError: If it is of other members or parameters; nothing is loaded.
        """
        names = {id(p): n for n, p in self._named_parameters().items()}
        check_loaded(self.method, self.param_groups, state_dict, names, len(self._ens))
        members = [group["member"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, member in zip(self.param_groups, members, strict=True):
            group["member"] = member  # torch's own groups have no such key
        for p in self._parameters():
            if p in self.state:
                states.normalise(self.state[p], self._rows_of(p))

    def select(self, ens: Ensemble, indices: Sequence[int]) -> MemberOptimizer:
        """An optimizer for some of the members, which goes on where this one stands.

        State and hyperparameters are copies: training goes its own way from here. See
        `write_back`.

        Args:
            ens: The ensemble of these members, ``big[indices]``.
            indices: The members, in the order that they have in ``ens``.

        Returns:
            An optimizer of the same class for ``ens``.

        Raises:
            ValueError: If ``ens`` has another number of members, or other parameters.

        Example:
            >>> from torch import nn
            >>> from unisono.optim import SGD
            >>> big = Ensemble([nn.Linear(3, 1) for _ in range(4)])
            >>> optimizer = SGD(big, lr=[0.1, 0.2, 0.3, 0.4])
            >>> small = big[[1, 3]]
            >>> [group["lr"] for group in optimizer.select(small, [1, 3]).param_groups]
            [0.2, 0.4]
        """
        name = f"{type(self).__name__}.select"
        members = check_chosen(name, indices, len(self._ens))
        check_fits(name, ens, members, self._named_parameters())
        theirs = dict(ens.members.named_parameters())
        matching = {id(p): theirs[n] for n, p in self._named_parameters().items()}
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        for p in self._parameters():
            if p in self.state:
                rows = None if self._is_shared(p) else members
                state[matching[id(p)]] = states.select(self.state[p], rows)
        chosen = type(self).__new__(type(self))
        chosen.__setstate__(
            {
                "_ens": ens,
                "defaults": {
                    k: PerMember(v[i] for i in members) if isinstance(v, PerMember) else v
                    for k, v in self.defaults.items()
                },
                "param_groups": grouping.select(
                    self.param_groups, len(self._ens), members, matching
                ),
                "state": state,
            }
        )
        return chosen

    @torch.no_grad()
    def write_back(self, other: MemberOptimizer, indices: Sequence[int]) -> None:
        """Bring the state of some members home, in place: the reverse of `select`.

        Hyperparameters stay. State of parameters that all members share is copied as a whole.

        Args:
            other: What `select` returned, trained further.
            indices: The members, in the order that they have in ``other``.

        Raises:
            TypeError: If it is an optimizer of another class.
            ValueError: If it has another number of members, or other parameters.
        """
        name = f"{type(self).__name__}.write_back"
        members = self._check_part(name, other, indices)
        self._copy_state(other, range(len(members)), members)

    @torch.no_grad()
    def take(self, other: MemberOptimizer, indices: Sequence[int]) -> None:
        """Take over state and hyperparameters of some members of the larger optimizer, in place.

        What `select` does for a new optimizer; this one goes on with what was changed since.

        Args:
            other: The optimizer that this one was selected from.
            indices: Which of its members these are.

        Raises:
            TypeError: If it is an optimizer of another class.
            ValueError: If it has another number of members, or other parameters.
        """
        name = f"{type(self).__name__}.take"
        members = other._check_part(name, self, indices)
        self._copy_state(other, members, range(len(members)))
        self.take_hyperparameters(other, indices)

    def take_hyperparameters(self, other: MemberOptimizer, indices: Sequence[int]) -> None:
        """Take over the hyperparameters alone, as after a scheduler of the larger optimizer.

        Args:
            other: As for `take`.
            indices: As for `take`.

        Raises:
            TypeError: If it is an optimizer of another class.
            ValueError: If it has another number of members, or other parameters.
        """
        name = f"{type(self).__name__}.take_hyperparameters"
        members = other._check_part(name, self, indices)
        theirs = grouping.pick(other.param_groups, len(other._ens), members)
        kept = ("params", "param_names", "member")
        for mine, group in zip(self.param_groups, theirs, strict=True):
            mine.update({key: value for key, value in group.items() if key not in kept})

    @torch.no_grad()
    def copy_members(self, src: int | Sequence[int], dst: int | Sequence[int]) -> None:
        """Copy the state of members over that of others; their hyperparameters stay.

        `Ensemble.copy_` calls it for each optimizer of the ensemble.

        Args:
            src: The member to copy, or several.
            dst: The member whose state is written over, or as many.

        Raises:
            IndexError: If there is no such member.
            ValueError: If there aren't as many, or one is to be written over twice.
        """
        of, to = check_copies(src, dst, len(self._ens))
        self._copy_state(self, of, to)

    def __getstate__(self) -> dict[str, Any]:
        """What torch keeps, and the ensemble; what is cached is made anew."""
        return {**super().__getstate__(), "_ens": self._ens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        self._ens.follow(self)

    def _forget(self) -> None:
        """Drop what is cached."""
        self._reader = Reader(self.method.hyperparameters)
        self._memory = Memory()
        named = self._ens.members.named_parameters()
        self._shared = frozenset(id(p) for n, p in named if n in self._ens.shared)

    def _is_shared(self, parameter: Tensor) -> bool:
        return id(parameter) in self._shared

    def _rows_of(self, parameter: Tensor) -> int | None:
        return None if self._is_shared(parameter) else len(self._ens)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _named_parameters(self) -> dict[str, Tensor]:
        """The parameters that this optimizer has, by their names in ``ens.members``."""
        mine = {id(p) for p in self._parameters()}
        return {n: p for n, p in self._ens.members.named_parameters() if id(p) in mine}

    def _with_gradient(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters to update: those of the members, and those that all members share."""
        own: list[Tensor] = []
        shared: list[Tensor] = []
        for p in parameters:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                name = next(n for n, q in self._named_parameters().items() if q is p)
                refuse_sparse(type(self).__name__, name)
            (shared if self._is_shared(p) else own).append(p)
        return own, shared

    def _check_part(
        self, name: str, part: MemberOptimizer, indices: Sequence[int]
    ) -> Sequence[int]:
        """The members that an optimizer for a part of this ensemble has."""
        if type(part) is not type(self):
            raise TypeError(
                f"{name}: both are {type(self).__name__} optimizers; got {type(part).__name__}"
            )
        members = check_chosen(name, indices, len(self._ens))
        check_fits(name, part._ens, members, self._named_parameters())
        missing = sorted(self._named_parameters().keys() ^ part._named_parameters().keys())
        if missing:
            listed = ", ".join(f"`{n}`" for n in missing)
            raise ValueError(f"{name}: only one of the optimizers trains {listed}")
        return members

    def _copy_state(self, source: MemberOptimizer, of: Sequence[int], to: Sequence[int]) -> None:
        theirs = source._named_parameters()
        for name, p in self._named_parameters().items():
            state = source.state.get(theirs[name], {})
            if not state and not self.state.get(p):
                continue  # nobody has stepped, and no empty entry shall stand for it
            if self._is_shared(p):
                states.copy(self.state[p], None, state, None, p)
            else:
                states.copy(self.state[p], to, state, of, p)
