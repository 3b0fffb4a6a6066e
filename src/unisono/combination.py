"""`Combination`: how the members of an ensemble are averaged, kept with the ensemble."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from unisono import combine
from unisono.calibration import pool

NAMES = ("weights", "temperatures", "pooled_temperature")


class Combination(nn.Module):
    """Weights and temperatures of N members, as ``ens.combination``; none until they are set.

    They go where the ensemble goes: into ``state_dict()``, pickles and copies, to devices by
    ``.to()``; ``ens[[0, 2]]`` has those of members 0 and 2. What ``ens(x)`` returns stays as it
    is: `probabilities` and `weighted` combine it. Training moves the members away from what was
    fitted to them; then fit and set again.

    Args:
        num_members: The number of members.

    Example:
        >>> from unisono import Ensemble
        >>> ens = Ensemble([nn.Linear(3, 4) for _ in range(2)])
        >>> ens.combination.set(weights=[0.25, 0.75])
        >>> x = torch.randn(8, 3)
        >>> ens.combination.probabilities(ens(x)).shape
        torch.Size([8, 4])
        >>> ens[[1]].combination.weights
        tensor([0.7500])
    """

    weights: Tensor | None
    temperatures: Tensor | None
    pooled_temperature: Tensor | None

    def __init__(self, num_members: int) -> None:
        super().__init__()
        self._n = num_members
        for name in NAMES:
            self.register_buffer(name, None)

    def set(
        self,
        *,
        weights: Tensor | Sequence[float] | None = None,
        temperatures: Tensor | Sequence[float] | None = None,
        pooled_temperature: Tensor | float | None = None,
    ) -> None:
        """Keep copies of these, and nothing of what was set before: they are fitted together.

        Args:
            weights: The members' weights, of `unisono.selection`; None for equal ones.
            temperatures: The members' temperatures, of `calibration.member_temperatures`.
            pooled_temperature: Of the average, of `calibration.pooled_temperature`.

        Raises:
            ValueError: If there aren't N numbers, weights are negative or sum to zero,
                temperatures aren't above zero, or any is NaN or infinite; nothing is changed.
            TypeError: If these are no numbers.

        Shape:
            - weights, temperatures: (N)
            - pooled_temperature: ()

        Example:
            >>> combination = Combination(2)
            >>> combination.set(weights=[1, 3], temperatures=[1.5, 2.0])
            >>> combination.temperatures
            tensor([1.5000, 2.0000])
        """
        given = {
            name: None if value is None else _copied(name, value)
            for name, value in zip(NAMES, (weights, temperatures, pooled_temperature), strict=True)
        }
        problems = [
            problem
            for name, value in given.items()
            if value is not None
            for problem in problems_of(name, value, self._shape(name))
        ]
        if problems:
            raise ValueError("ens.combination.set: " + "; ".join(problems))
        for name, value in given.items():
            setattr(self, name, value)

    def probabilities(
        self, logits: Tensor, dim: int = -1, *, mesh: DeviceMesh | None = None
    ) -> Tensor:
        """Average logits as probabilities: ``softmax(log(sum_i w[i] softmax(z[i] / T[i])) / T)``.

        What isn't set is left out; without any, this is `combine.probabilities`.

        Args:
            logits: What ``ens(x)`` returns.
            dim: The class axis.
            mesh: As for `combine.mean`.

        Returns:
            The probabilities, of the same dtype; half precision is computed in float32.

        Shape:
            - logits: (N, *, C)
            - returns: (*, C)

        Raises:
            ValueError: If the logits are those of another number of members.

        Example:
            >>> combination = Combination(2)
            >>> combination.set(weights=[0.5, 0.5], pooled_temperature=0.5)
            >>> combination.probabilities(torch.tensor([[0.0, 0.0], [0.0, 9.0]]))
            tensor([0.1001, 0.8999])
        """
        self._check("probabilities", logits)
        if not self._set():
            return combine.probabilities(logits, dim, mesh=mesh)
        pooled = pool(
            logits, weights=self.weights, temperatures=self.temperatures, dim=dim, mesh=mesh
        )
        if self.pooled_temperature is not None:
            pooled = pooled / self.pooled_temperature.to(pooled)
        # Counted from the end, an axis keeps its number when the members' goes.
        return pooled.softmax(dim if dim < 0 else dim - logits.ndim).to(logits.dtype)

    def weighted(self, outputs: Tensor, *, mesh: DeviceMesh | None = None) -> Tensor:
        """Average outputs as they are: ``sum_i w[i] outputs[i]``, of numbers or probabilities.

        Args:
            outputs: What ``ens(x)`` returns.
            mesh: As for `combine.mean`.

        Returns:
            The average, of the same dtype; with equal weights if none are set.

        Shape:
            - outputs: (N, *)
            - returns: (*)

        Raises:
            ValueError: If the outputs are those of another number of members, or temperatures are
                set, which only mean something for logits.

        Example:
            >>> combination = Combination(2)
            >>> combination.set(weights=[1, 3])
            >>> combination.weighted(torch.tensor([[0.0], [8.0]]))
            tensor([6.])
        """
        self._check("weighted", outputs)
        if self.temperatures is not None or self.pooled_temperature is not None:
            raise ValueError(
                "ens.combination.weighted: temperatures are set, and they divide logits; use"
                " ens.combination.probabilities(logits), or"
                " ens.combination.set(weights=ens.combination.weights) to drop them"
            )
        if self.weights is None:
            return combine.mean(outputs, mesh=mesh)
        return combine.weighted(outputs, self.weights, mesh=mesh)

    def select(self, members: Sequence[int]) -> Combination:
        """A copy with the rows of these members; the pooled temperature is that of all."""
        chosen = Combination(len(members)).train(self.training)
        for name, tensor in self._set():
            if tensor.ndim:
                index = torch.tensor(list(members), dtype=torch.int64, device=tensor.device)
                setattr(chosen, name, tensor.index_select(0, index))
            else:
                setattr(chosen, name, tensor.clone())
        return chosen

    @torch.no_grad()
    def copy_members(self, src: Sequence[int], dst: Sequence[int]) -> None:
        """Copy the rows of members ``src`` over those of members ``dst``."""
        for _, tensor in self._set():
            if tensor.ndim:
                of, to = (torch.tensor(list(i), device=tensor.device) for i in (src, dst))
                tensor.index_copy_(0, to, tensor.index_select(0, of))

    def make_room(self, state_dict: Mapping[str, Any], prefix: str, device: torch.device) -> None:
        """Become what a state can be loaded into: it says what is set and what isn't.

        A state without weights, such as one from before they were fitted, is that of an ensemble
        without: they are no longer set.

        Args:
            state_dict: The state to load.
            prefix: What stands before the names in it.
            device: Where the ensemble lies.
        """
        for name in NAMES:
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and getattr(self, name) is None:
                room = torch.empty(self._shape(name), dtype=value.dtype, device=device)
                setattr(self, name, room)
            elif value is None:
                setattr(self, name, None)

    def extra_repr(self) -> str:
        """What is set, by name."""
        return ", ".join(f"{name}={tuple(tensor.shape)}" for name, tensor in self._set())

    def _set(self) -> list[tuple[str, Tensor]]:
        named = [(name, getattr(self, name)) for name in NAMES]
        return [(name, tensor) for name, tensor in named if tensor is not None]

    def _shape(self, name: str) -> tuple[int, ...]:
        return () if name == "pooled_temperature" else (self._n,)

    def _check(self, method: str, outputs: Any) -> None:
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"ens.combination.{method}: expected one tensor of outputs, got"
                f" {type(outputs).__name__}; combine each tensor in it by itself"
            )
        if outputs.ndim == 0 or outputs.shape[0] != self._n:
            raise ValueError(
                f"ens.combination.{method}: axis 0 of the outputs is the member, and there are"
                f" {self._n}, but their shape is {tuple(outputs.shape)}; pass all of ens(x)"
            )


def _copied(name: str, value: Tensor | Sequence[float] | float) -> Tensor:
    if isinstance(value, Tensor):
        wide = torch.promote_types(value.dtype, torch.float32)
        return value.detach().to(wide, copy=True)
    try:
        return torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"ens.combination.set: {name}: a tensor or numbers, got {value!r}"
        ) from error


def problems_of(name: str, value: Tensor, shape: tuple[int, ...]) -> list[str]:
    """What is wrong with a tensor that is to be kept; values are read once, when it is set.

    Args:
        name: One of `NAMES`, with a prefix or without.
        value: The tensor.
        shape: The one it is to have.

    Returns:
        One fact a problem.
    """
    if tuple(value.shape) != shape:
        return [f"{name} has shape {shape}, got {tuple(value.shape)}"]
    if value.is_complex():
        return [f"{name} are real numbers, got {value.dtype}"]
    numbers = value.reshape(-1).tolist()
    if not name.endswith("weights"):
        wrong = [x for x in numbers if not (math.isfinite(x) and x > 0)]
        return [f"{name}: finite and above zero, got {wrong[0]}"] if wrong else []
    wrong = [x for x in numbers if not (math.isfinite(x) and x >= 0)]
    if wrong:
        return [f"{name}: finite and not negative, got {wrong[0]}"]
    return [] if any(numbers) else [f"{name}: all {len(numbers)} are zero"]
