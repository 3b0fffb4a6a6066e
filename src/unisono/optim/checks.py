"""The arguments of the optimizers' methods, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from unisono.ensemble import Ensemble
from unisono.errors import CheckpointError
from unisono.optim.paths import Method
from unisono.options import check_indices


def check_ensemble(name: str, ens: Any) -> None:
    """Raise unless the first argument of an optimizer is an ensemble."""
    if not isinstance(ens, Ensemble):
        raise TypeError(
            f"{name}: the first argument is an Ensemble; got {type(ens).__name__}; write"
            f" {name}(ens, lr=...), and params= if it is to train some parameters only"
        )


def active_members(name: str, active: Any, n: int) -> list[int] | None:
    """The members that a mask of N booleans means; None for all."""
    if active is None:
        return None
    values = active.tolist() if isinstance(active, Tensor | np.ndarray) else active
    is_mask = isinstance(values, Sequence) and all(isinstance(v, bool | np.bool_) for v in values)
    if not is_mask or len(values) != n:
        raise ValueError(
            f"{name}.step: active is a mask of {n} booleans, one per member; got {active!r}; write"
            f" active=[i in members for i in range({n})]"
        )
    chosen = [i for i, is_active in enumerate(values) if is_active]
    return None if len(chosen) == n else chosen


def check_chosen(name: str, indices: Any, n: int) -> list[int]:
    """The members that a list of indices means, each at most once and at least one."""
    members = check_indices(indices, n)
    if not members or len(set(members)) < len(members):
        raise ValueError(f"{name}: indices are different members, at least one; got {indices!r}")
    return members


def check_fits(name: str, ens: Ensemble, members: Sequence[int], wanted: Mapping[str, Any]) -> None:
    """Raise unless an ensemble has this many members and parameters of these names."""
    if len(ens) != len(members):
        raise ValueError(
            f"{name}: the ensemble of members {list(members)} has {len(members)} of them, this one"
            f" has {len(ens)}; pass big[{list(members)}]"
        )
    missing = sorted(wanted.keys() - dict(ens.members.named_parameters()).keys())
    if missing:
        listed = ", ".join(f"`{n}`" for n in missing)
        raise ValueError(f"{name}: the ensemble has no parameter {listed}; pass big[indices]")


def check_not_captured(name: str) -> None:
    """Raise while a CUDA graph is captured: the numbers of this step would be part of it."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name}.step: a CUDA graph would repeat this step's hyperparameters and bias"
            f" corrections, which are numbers on the host; capture forward and backward, and step"
            f" outside of the graph"
        )


def refuse_sparse(name: str, parameter: str) -> NoReturn:
    """Raise because a gradient is sparse."""
    raise RuntimeError(
        f"{name}.step: the gradient of `{parameter}` is sparse, and {name} needs dense ones; write"
        f" nn.Embedding(..., sparse=False)"
    )


def check_loaded(
    method: Method,
    groups: Sequence[Mapping[str, Any]],
    loaded: Mapping[str, Any],
    names: Mapping[int, str],
    n: int,
) -> None:
    """Raise if a state is of other members or of other parameters than an optimizer's.

    Args:
        method: The kind of optimizer.
        groups: Its param groups.
        loaded: The state.
        names: The names of the parameters by their ids.
        n: The number of members.

    Raises:
        CheckpointError: With all that doesn't fit.
    """
    theirs = loaded["param_groups"]
    problems = (
        _value_problems(method, theirs)
        or _group_problems(groups, theirs, n)
        or _tensor_problems(groups, theirs, loaded["state"], names)
    )
    if problems:
        raise CheckpointError(f"{method.name}.load_state_dict: " + "; ".join(problems))


def _value_problems(method: Method, theirs: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [spec.name for spec in method.hyperparameters]
    missing = [n for n in names if any(n not in group for group in theirs)]
    if not missing:
        return []
    return [f"the state has no {', '.join(missing)}; it is of another optimizer than {method.name}"]


def _group_problems(
    mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], n: int
) -> list[str]:
    ours, others = ([group.get("member") for group in groups] for groups in (mine, theirs))
    if ours != others:
        found = {m for m in others if m is not None}
        if found and len(found) != n:
            count = len(found)
            problem = (
                f"the state has groups of {count} members, this optimizer is for {n}; load it for"
                f" an ensemble of {count}, and take some of them with"
                f" optimizer.select(big[indices], indices)"
            )
        else:
            problem = (
                f"the state has {_described(others)}, this optimizer has {_described(ours)}; make"
                f" it with the same params=, and one value per member where that one had them"
            )
        return [problem]
    return [
        f"group {k} of the state has {len(b['params'])} parameters, here it has {len(a['params'])}"
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True))
        if len(a["params"]) != len(b["params"])
    ]


def _described(members: Sequence[Any]) -> str:
    single = sum(m is None for m in members)
    return f"{single} groups for all members and {len(members) - single} for single ones"


def _tensor_problems(
    mine: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Any],
    names: Mapping[int, str],
) -> list[str]:
    parameters = [p for group in mine for p in group["params"]]
    keys = [k for group in theirs for k in group["params"]]
    problems = []
    for key, parameter in zip(keys, parameters, strict=True):
        for what, value in state.get(key, {}).items():
            if not isinstance(value, Tensor) or value.shape == parameter.shape:
                continue
            if what == "step" and value.numel() == 1:
                continue
            if what == "step" and value.shape == parameter.shape[:1]:
                continue
            problems.append(
                f"`{names[id(parameter)]}`: {what} has shape {tuple(value.shape)}, the parameter"
                f" has {tuple(parameter.shape)}"
            )
    if problems:
        problems.append("load it for an ensemble of as many members")
    return problems
