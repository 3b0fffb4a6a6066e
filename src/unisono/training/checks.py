"""What `fit` needs to be true before it starts: all problems in one message."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from unisono.optim import MemberOptimizer

_MIXED_PRECISION: Final = torch.bfloat16


def check_fit(
    ens: Any,
    *,
    loss: Any,
    optimizer: Any,
    counts: Mapping[str, Any],
    patience: Any,
    min_delta: Any,
    max_grad_norm: Any,
    autocast: Any,
    has_validation: bool,
    metrics: Mapping[str, Any],
    schedulers: Sequence[Any],
    scheduler_every: Any,
    checkpoint: str | os.PathLike[str] | None,
    resume: bool,
) -> None:
    """Raise unless a training with these arguments can start; see `fit` for what they are."""
    _check_kinds(ens, loss, optimizer, metrics, schedulers)
    problems = [
        f"{name} is a whole number, at least 1; got {value!r}"
        for name, value in {
            **counts,
            **({} if patience is None else {"patience": patience}),
        }.items()
        if type(value) is not int or value < 1
    ]
    if patience is not None and not has_validation:
        problems.append(
            "patience counts epochs without a lower validation loss, and there are no"
            " validation data; pass validation=(x, y)"
        )
    if metrics and not has_validation:
        problems.append("metrics are taken on validation data; pass validation=(x, y)")
    if not _is_number(min_delta) or not 0 <= min_delta < math.inf:
        problems.append(f"min_delta is a number, at least 0; got {min_delta!r}")
    problems += _norm_problems(max_grad_norm, len(ens))
    if autocast not in (None, _MIXED_PRECISION):
        problems.append(
            f"autocast is torch.bfloat16 or None; got {autocast!r}. float16 needs one loss scale"
            f" for all members, so one member's overflow would cost the others a step"
        )
    if scheduler_every not in ("epoch", "step"):
        problems.append(f'scheduler_every is "epoch" or "step"; got {scheduler_every!r}')
    problems += _scheduler_problems(schedulers, optimizer, scheduler_every, has_validation)
    if resume and checkpoint is None:
        problems.append("resume=True goes on from a file; pass checkpoint=path")
    if problems:
        raise ValueError("fit: " + "; ".join(problems))
    if checkpoint is not None:
        _check_file(Path(checkpoint), resume=resume)


def _check_kinds(
    ens: Any, loss: Any, optimizer: Any, metrics: Mapping[str, Any], schedulers: Sequence[Any]
) -> None:
    problems = []
    if not callable(loss):
        problems.append(f"loss is a function loss(output, target); got {loss!r}")
    problems += [
        f"metrics[{name!r}] is a function metric(output, target); got {metric!r}"
        for name, metric in metrics.items()
        if not callable(metric)
    ]
    problems += [
        f"scheduler is one of torch.optim.lr_scheduler, or a list of them; got {scheduler!r}"
        for scheduler in schedulers
        if not callable(getattr(scheduler, "step", None))
    ]
    if not isinstance(optimizer, MemberOptimizer):
        kind = type(optimizer).__name__
        problems.append(
            f"optimizer is one of unisono.optim (SGD, Adam, AdamW, RMSprop), which can let single"
            f" members go; got {kind}. Write optimizer=unisono.optim.Adam(ens, lr=1e-3), or a"
            f" training loop of your own with {kind}"
        )
    else:
        own = {id(parameter) for parameter in ens.parameters()}
        given = [p for group in optimizer.param_groups for p in group["params"]]
        if any(id(parameter) not in own for parameter in given):
            problems.append(
                "the optimizer was made for other parameters than those of this ensemble; make"
                " it anew: unisono.optim.Adam(ens, lr=1e-3)"
            )
    if problems:
        raise TypeError("fit: " + "; ".join(problems))


def _norm_problems(norm: Any, n: int) -> list[str]:
    if norm is None or (_is_number(norm) and norm > 0):
        return []
    if isinstance(norm, Sequence) and not isinstance(norm, str):
        if len(norm) == n and all(_is_number(value) and value > 0 for value in norm):
            return []
    return [f"max_grad_norm is a positive number, or {n} of them; got {norm!r}"]


def _scheduler_problems(
    schedulers: Sequence[Any], optimizer: Any, every: Any, has_validation: bool
) -> list[str]:
    problems = []
    for scheduler in schedulers:
        kind = type(scheduler).__name__
        if getattr(scheduler, "optimizer", optimizer) is not optimizer:
            problems.append(f"{kind} was made for another optimizer")
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            if every == "step":
                problems.append(f'{kind} goes by epochs; pass scheduler_every="epoch"')
            if not has_validation:
                problems.append(f"{kind} goes by the validation loss; pass validation=(x, y)")
    return problems


def _check_file(path: Path, *, resume: bool) -> None:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"fit: checkpoint={str(path)!r}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"fit: checkpoint={str(path)!r} is a folder; name a file in it")
    if path.exists() and not resume:
        raise FileExistsError(
            f"fit: checkpoint={str(path)!r} is there already; pass resume=True to go on from it,"
            f" or name another file"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
