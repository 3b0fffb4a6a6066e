"""The members of an estimator: built from a factory, checked, given the statistics of the data."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unisono.ensemble import Ensemble
from unisono.estimators.moments import Array, Moments
from unisono.estimators.networks import GaussianMLP, Standardise, TabularMLP
from unisono.estimators.settings import Settings

Factory = Callable[[int, int], nn.Module]

_SHOWN_ROWS = 2  # to a new member, to see what it returns


@dataclass(frozen=True)
class Plan:
    """What is known of a member before any is built.

    Args:
        make_model: Makes a member.
        shared: Names of the statistics, which all members have in common.
        is_gaussian: Whether a member returns mean and variance.
    """

    make_model: Callable[[], nn.Module]
    shared: tuple[str, ...]
    is_gaussian: bool


def new_members(
    call: str,
    module: Factory | None,
    settings: Settings,
    x: Array,
    n_outputs: int,
    *,
    may_be_gaussian: bool,
    seed: int,
) -> tuple[Ensemble, bool]:
    """Make untrained members for rows like these.

    Args:
        call: Name of the public function, for the message.
        module: Makes a member; None for the default network.
        settings: Number of members, default network, strategy, device and dtype.
        x: Rows; the first are shown to a member.
        n_outputs: Of a member.
        may_be_gaussian: Whether a pair of mean and variance is a possible output; then it is that
            of the default network.
        seed: Of member 0.

    Returns:
        The ensemble in eval mode, and whether its members return mean and variance.

    Shape:
        - x: (B, F)
    """
    check_device(call, settings.device)
    if module is None:
        module = functools.partial(
            GaussianMLP if may_be_gaussian else TabularMLP,
            hidden_layer_sizes=settings.hidden_layer_sizes,
            dropout=settings.dropout,
        )
    plan = plan_members(
        call,
        module,
        (x.shape[1], n_outputs),
        torch.tensor(x[:_SHOWN_ROWS], dtype=settings.dtype_for(x)),
        may_be_gaussian=may_be_gaussian,
        seed=seed,
    )
    return build_members(plan, settings, seed).eval(), plan.is_gaussian


def plan_members(
    call: str,
    factory: Factory,
    sizes: tuple[int, int],
    rows: Tensor,
    *,
    may_be_gaussian: bool,
    seed: int,
) -> Plan:
    """Make one member and show it some rows, before anything is trained.

    Args:
        call: Name of the public function, for the message.
        factory: ``factory(n_features, n_outputs)`` returns a new module.
        sizes: Number of features and of outputs.
        rows: A few rows of the data, in the dtype of the network.
        may_be_gaussian: Whether a pair of mean and variance is a possible output.
        seed: Of the member; the global generators are afterwards as before.

    Returns:
        What is needed to build all members.

    Raises:
        TypeError: If the factory is none, or returns no module.
        ValueError: If the module doesn't take the rows, or returns other shapes.
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        raise TypeError(
            f"{call}: module is a function that makes a member, got {type(factory).__name__};"
            f" pass module=lambda n_features, n_outputs: Net(...), or None for the default network"
        )
    make_model = functools.partial(_make, factory, *sizes, rows.dtype)
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))), torch.no_grad():
        torch.manual_seed(seed)
        model = make_model()
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"{call}: module({sizes[0]}, {sizes[1]}) returns a {type(model).__name__}, but a"
                f" member is a torch.nn.Module"
            )
        try:
            output = model.eval()(rows)
        except Exception as error:
            error.add_note(f"{call}: raised by a member that was shown {tuple(rows.shape)} rows")
            raise
    _check_output(call, output, (len(rows), sizes[1]), may_be_gaussian)
    names = [name for name, part in model.named_modules() if isinstance(part, Standardise)]
    prefixes = [f"{name}." if name else "" for name in names]
    shared = tuple(f"{prefix}{key}" for prefix in prefixes for key in ("mean", "scale"))
    return Plan(make_model, shared, not isinstance(output, Tensor))


def check_device(call: str, device: torch.device) -> None:
    """Raise unless there is such a device.

    Args:
        call: Name of the public function, for the message.
        device: Where an ensemble is to be.

    Raises:
        ValueError: If it isn't there.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f'{call}: device="{device}" can\'t be used here: {reason}; device="cpu" can'
        ) from error


def build_members(plan: Plan, settings: Settings, seed: int) -> Ensemble:
    """Build the ensemble where it is to run; member i has the weights of ``seed + i``.

    Args:
        plan: What `plan_members` returned.
        settings: Number of members, strategy and device.
        seed: Of member 0.
    """
    ens = Ensemble.build(
        plan.make_model,
        settings.n_members,
        seed=seed,
        shared=plan.shared,
        strategy=settings.strategy,
    )
    return ens.to(settings.device)


def standardise_by(ens: Ensemble, moments: Moments) -> None:
    """Fill every `Standardise` of the members with these statistics, in place.

    Args:
        ens: An ensemble that shares them, as `build_members` makes it.
        moments: Of the features.
    """
    for part in ens[0].modules():
        if isinstance(part, Standardise) and len(part.mean) == len(moments.mean):
            part.mean.copy_(torch.from_numpy(moments.mean))
            part.scale.copy_(torch.from_numpy(moments.scale()))


def _make(factory: Factory, n_features: int, n_outputs: int, dtype: torch.dtype) -> Any:
    model = factory(n_features, n_outputs)
    return model.to(dtype) if isinstance(model, nn.Module) else model


def _check_output(call: str, output: Any, shape: tuple[int, int], may_be_gaussian: bool) -> None:
    """Raise unless the output is one tensor of this shape, or a pair of them."""
    is_pair = may_be_gaussian and isinstance(output, tuple | list) and len(output) == 2
    tensors = list(output) if is_pair else [output]
    found = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in tensors]
    if all(each == shape for each in found):
        return
    pair = ", or a pair of mean and variance of that shape" if may_be_gaussian else ""
    got = " and ".join(map(str, found))
    raise ValueError(
        f"{call}: a member returns (rows, n_outputs), here {shape}{pair}; got {got}. See the"
        f" second argument of module(n_features, n_outputs)"
    )
