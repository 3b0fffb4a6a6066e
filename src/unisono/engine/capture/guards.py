"""The conditions under which a recorded program holds, as Python functions without loops.

They are asked before each replay, and in a small network each look-up counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Guard = Callable[..., bool]


class Guards:
    """What has to be as it was at the recording.

    Args:
        inputs: The input tensors.
        modes: The ``__dict__`` of each module that has a mode.
        devices: The kinds of devices whose autocasting matters.

    Attributes:
        inputs: ``inputs(*tensors)``: whether this is such a call as was recorded.
    """

    def __init__(
        self, inputs: Sequence[Tensor], modes: Sequence[Mapping[str, Any]], devices: Sequence[str]
    ) -> None:
        self._names: dict[str, Any] = {"torch": torch}
        self._terms: list[str] = []
        for k, x in enumerate(inputs):
            self._terms += _input_terms(k, x, self._names)
        for k, mode in enumerate(modes):
            self._names[f"module{k}"] = mode
            self._terms.append(f'module{k}["training"] is {mode["training"]}')
        for device in devices:
            self._terms += _autocast_terms(device, self._names)
        self._arguments = ", ".join(f"x{k}" for k in range(len(inputs)))
        self.inputs = _function(self._arguments, self._terms, self._names)

    def bind(self, sources: Sequence[tuple[dict[str, Any], str]]) -> tuple[Guard, Guard]:
        """Guards on the ensemble's tensors.

        Args:
            sources: The dict and the key where the ensemble keeps each tensor.

        Returns:
            ``weights()``: whether the tensors are where they are now; and
            ``both(*tensors)``: that, and `inputs`.
        """
        names = dict(self._names)
        terms = [
            term
            for k, (home, key) in enumerate(sources)
            for term in _weight_terms(k, home, key, names)
        ]
        weights = _function("", terms, names)
        return weights, _function(self._arguments, self._terms + terms, names)


def autocast_dtype(device: str) -> torch.dtype | None:
    """To which dtype operations on this kind of device are cast, None if they aren't."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _input_terms(k: int, x: Tensor, names: dict[str, Any]) -> list[str]:
    names |= {f"shape{k}": x.shape, f"dtype{k}": x.dtype, f"device{k}": x.device}
    strides = f"x{k}.stride() == {tuple(x.stride())}"
    terms = [
        f"x{k}.shape == shape{k}",
        f"x{k}.is_contiguous()" if x.is_contiguous() else strides,
        f"x{k}.dtype is dtype{k}",
        f"x{k}.device == device{k}",
        f"not (x{k}.requires_grad and torch.is_grad_enabled())",
    ]
    if x.is_complex():
        terms += [f"x{k}.is_conj() is {x.is_conj()}", f"x{k}.is_neg() is {x.is_neg()}"]
    return terms


def _autocast_terms(device: str, names: dict[str, Any]) -> list[str]:
    dtype = autocast_dtype(device)
    if dtype is None:
        return [f'not torch.is_autocast_enabled("{device}")']
    names[f"{device}_dtype"] = dtype
    return [
        f'torch.is_autocast_enabled("{device}")',
        f'torch.get_autocast_dtype("{device}") is {device}_dtype',
    ]


def _weight_terms(k: int, home: dict[str, Any], key: str, names: dict[str, Any]) -> list[str]:
    value = home.get(key)
    names |= {f"home{k}": home, f"value{k}": value}
    terms = [f"home{k}.get({key!r}) is value{k}"]
    if isinstance(value, Tensor):
        # A step of an optimizer leaves the address as it is; `p.data = ...` and `.to()` don't.
        names[f"address{k}"] = value.data_ptr
        terms.append(f"address{k}() == {value.data_ptr()}")
    return terms


def _function(arguments: str, terms: Sequence[str], names: dict[str, Any]) -> Guard:
    condition = "\n        and ".join(terms) or "True"
    exec(f"def guard({arguments}):\n    return (\n        {condition}\n    )\n", names)
    guard: Guard = names.pop("guard")
    return guard
