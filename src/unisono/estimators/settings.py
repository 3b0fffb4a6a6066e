"""The parameters of an estimator, checked: all problems in one message."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Final, get_args

import numpy as np
import torch

from unisono.engine.planning.plan import StrategyName
from unisono.training.sampling import Sampling, as_sampling

DTYPES: Final[Mapping[str, torch.dtype]] = {"float32": torch.float32, "float64": torch.float64}
_MOST_HELD_OUT: Final = 0.5


@dataclass(frozen=True)
class Settings:
    """What training needs to know, as plain Python values.

    Args:
        n_members: Number of members.
        sampling: Which rows each member sees.
        hidden_layer_sizes: Of the default network.
        dropout: Of the default network.
        learning_rate: One number, or one per member.
        weight_decay: One number, or one per member.
        batch_size: Rows of a minibatch, at most.
        max_epochs: Epochs, at most.
        validation_fraction: Part of the rows that is held out to stop by.
        patience: Epochs without improvement after which a member stops; None for no stopping.
        min_delta: How much lower a loss has to be to count as an improvement.
        device: Where the ensemble trains and predicts.
        dtype: Of the network; None for that of the data.
        strategy: How a call runs; see `Ensemble`.
        verbose: Whether there is a progress bar.
    """

    n_members: int
    sampling: Sampling
    hidden_layer_sizes: tuple[int, ...]
    dropout: float
    learning_rate: float | list[float]
    weight_decay: float | list[float]
    batch_size: int
    max_epochs: int
    validation_fraction: float
    patience: int | None
    min_delta: float
    device: torch.device
    dtype: torch.dtype | None
    strategy: StrategyName
    verbose: bool

    def dtype_for(self, x: np.ndarray[Any, np.dtype[Any]]) -> torch.dtype:
        """The dtype of a network that is trained on ``x``."""
        if self.dtype is not None:
            return self.dtype
        # Accelerators are slow in double precision, or haven't got it.
        is_double = x.dtype == np.float64 and self.device.type == "cpu"
        return torch.float64 if is_double else torch.float32


def check_settings(call: str, given: Mapping[str, Any]) -> Settings:
    """The parameters of an estimator as settings, or one error for all that can't be.

    Args:
        call: Name of the public function, for the message.
        given: The parameters by name; others than those of `Settings` are passed over.

    Returns:
        The settings.

    Raises:
        ValueError: If a parameter isn't possible.
    """
    problems: list[str] = []
    n = given["n_members"]
    for name in ("n_members", "batch_size", "max_epochs"):
        if not _is_count(given[name]):
            problems.append(f"{name} is a whole number, at least 1; got {given[name]!r}")
    if given["patience"] is not None and not _is_count(given["patience"]):
        problems.append(
            f"patience is a whole number, at least 1, or None; got {given['patience']!r}"
        )
    problems += _network_problems(given["hidden_layer_sizes"], given["dropout"])
    if not _is_number(given["min_delta"]) or not 0 <= given["min_delta"] < math.inf:
        problems.append(f"min_delta is a number, at least 0; got {given['min_delta']!r}")
    for name in ("learning_rate", "weight_decay"):
        problems += _rate_problems(name, given[name], int(n) if _is_count(n) else None)
    fraction = given["validation_fraction"]
    if not _is_number(fraction) or not 0 < fraction <= _MOST_HELD_OUT:
        problems.append(
            f"validation_fraction is a part of the rows, above 0 and at most {_MOST_HELD_OUT};"
            f" got {fraction!r}; patience=None holds out nothing"
        )
    if given["dtype"] is not None and given["dtype"] not in list(DTYPES):
        problems.append(f'dtype is "float32", "float64" or None; got {given["dtype"]!r}')
    if given["strategy"] not in get_args(StrategyName):
        choices = ", ".join(f'"{name}"' for name in get_args(StrategyName))
        problems.append(f"strategy is one of {choices}; got {given['strategy']!r}")
    sampling = _try(problems, lambda: as_sampling(given["sampling"]))
    device = _try(problems, lambda: _device(given["device"]))
    if problems:
        raise ValueError(f"{call}: " + "; ".join(problems))
    assert sampling is not None
    assert device is not None
    return Settings(
        n_members=int(n),
        sampling=sampling,
        hidden_layer_sizes=_sizes(given["hidden_layer_sizes"]),
        dropout=float(given["dropout"]),
        learning_rate=_rate(given["learning_rate"]),
        weight_decay=_rate(given["weight_decay"]),
        batch_size=int(given["batch_size"]),
        max_epochs=int(given["max_epochs"]),
        validation_fraction=float(fraction),
        min_delta=float(given["min_delta"]),
        patience=None if given["patience"] is None else int(given["patience"]),
        device=device,
        dtype=None if given["dtype"] is None else DTYPES[given["dtype"]],
        strategy=given["strategy"],
        verbose=bool(given["verbose"]),
    )


def _network_problems(sizes: Any, dropout: Any) -> list[str]:
    problems = []
    if not (_is_count(sizes) or (_is_list(sizes) and all(map(_is_count, sizes)))):
        problems.append(
            f"hidden_layer_sizes is a list of whole numbers, at least 1 each; got {sizes!r}"
        )
    if not _is_number(dropout) or not 0 <= dropout < 1:
        problems.append(f"dropout is a probability, at least 0 and below 1; got {dropout!r}")
    return problems


def _rate_problems(name: str, value: Any, n: int | None) -> list[str]:
    values = list(value) if _is_list(value) else [value]
    if not all(_is_number(each) and 0 <= each < math.inf for each in values):
        return [f"{name} is a number of at least 0, or one per member; got {value!r}"]
    if _is_list(value) and n is not None and len(values) != n:
        return [f"{name} is one number, or one for each of the {n} members; got {len(values)}"]
    return []


def _try(problems: list[str], make: Any) -> Any:
    try:
        return make()
    except (ValueError, TypeError, RuntimeError) as error:
        problems.append(str(error))
        return None


def _device(value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(
            f'device is what torch.device takes, as "cpu" or "cuda"; got {value!r}'
        ) from None


def _sizes(value: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in value) if _is_list(value) else (int(value),)


def _rate(value: Any) -> float | list[float]:
    return [float(each) for each in value] if _is_list(value) else float(value)


def _is_list(value: Any) -> bool:
    is_array = isinstance(value, np.ndarray) and value.ndim == 1
    return is_array or (isinstance(value, Sequence) and not isinstance(value, str))


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
