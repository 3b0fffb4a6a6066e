"""Where a training stands, in one file: written whole after an epoch, taken up in a new process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from unisono import plans
from unisono.checkpoint.reading import read
from unisono.checkpoint.writing import write
from unisono.engine.where import caller_level
from unisono.ensemble import Ensemble
from unisono.errors import CheckpointError, EnsembleWarning
from unisono.training.blocks import (
    groups_of_all,
    groups_of_block,
    rows_of_all,
    rows_of_block,
    schedule_of_all,
    schedule_of_block,
)
from unisono.training.history import Array, EpochRecord, Validation
from unisono.training.plain import from_plain, to_plain
from unisono.training.running import Running, shared_tensors
from unisono.training.session import Session

_FORMAT: Final = 2
_WHAT: Final = "a checkpoint of unisono.fit"


class Checkpoint:
    """The file that a training is kept in.

    Args:
        path: The file.
        every: Epochs from one writing to the next; the last epoch is always written.
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int) -> None:
        self.path = Path(path)
        self.every = every
        self._has_warned = False

    def save(self, session: Session, running: Running) -> None:
        """Write where the training stands, if it is time; the first rank does it for all.

        Raises:
            OSError: If the disk refuses; the file of an earlier epoch is as it was.
        """
        done = len(session.records)
        is_last = done == session.schedule.epochs or not session.stopping.running
        if done % self.every and not is_last:
            return
        running.gather(session.best)
        ranks, schedulers = session.ranks, session.schedule.schedulers
        tensors, state = _tensors(session), session.optimizer.state_dict()
        groups, schedules = state["param_groups"], [each.state_dict() for each in schedulers]
        if ranks.have_blocks:
            tensors = rows_of_all(tensors, _stacked(tensors, session), ranks)
            schedules = [schedule_of_all(each, groups, ranks) for each in schedules]
            groups = groups_of_all(groups, ranks)
        known = ranks.gather(plans.to_dict())
        ranks.together(
            lambda: (
                self._write(session, tensors, groups, schedules, known) if ranks.is_first else None
            )
        )

    def _write(
        self,
        session: Session,
        tensors: Mapping[str, Tensor],
        groups: Sequence[Any],
        schedules: Sequence[Mapping[str, Any]],
        known: Sequence[Any],
    ) -> None:
        self._tell_what_is_left_out(session.ens)
        facts = {
            "format": _FORMAT,
            "settings": to_plain(dict(session.settings), "the settings"),
            "groups": to_plain(list(groups), "the optimizer's state"),
            "schedulers": [
                to_plain(dict(own), f"the state of scheduler {k}")
                for k, own in enumerate(schedules)
            ],
            "reasons": list(session.stopping.reasons),
            "computed": session.computed,
            "held": session.held,
            "metrics": list(session.validator.metrics) if session.validator else [],
            "plans": list(known),
        }
        write(self.path, tensors, facts)

    def load(self, session: Session) -> None:
        """Bring the training to where the file says it stood.

        Raises:
            OSError: If the file can't be read.
            CheckpointError: If it is of another training; nothing is changed then.
        """
        tensors, facts = read(self.path, what=_WHAT)
        ranks = session.ranks
        try:
            if ranks.have_blocks:
                tensors = rows_of_block(tensors, _stacked(tensors, session), ranks)
            self._check(session, tensors, facts)
            groups = from_plain(facts["groups"])
            schedulers = [from_plain(own) for own in facts["schedulers"]]
            if ranks.have_blocks:
                own_groups = session.optimizer.state_dict()["param_groups"]
                schedulers = [schedule_of_block(own, groups, ranks) for own in schedulers]
                groups = groups_of_block(groups, own_groups, ranks)
            state = _optimizer_state(tensors, groups)
            records = _records(tensors, facts["metrics"])
            reasons, computed = list(facts["reasons"]), list(facts["computed"])
            held, known = [list(own) for own in facts["held"]], list(facts["plans"])
            best = {name: tensors[f"history.{name}"].numpy() for name in ("best", "best_epoch")}
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path} isn't {_WHAT}: {error!r}") from error
        device = next(session.ens.parameters()).device
        session.optimizer.load_state_dict(state)
        _put(_own(session.ens), _part(tensors, "ensemble."))
        session.best = {n: t.to(device) for n, t in _part(tensors, "best.").items()}
        for scheduler, own in zip(session.schedule.schedulers, schedulers, strict=True):
            scheduler.load_state_dict(own)
        session.records, session.computed = records, computed
        is_same = len(known) == ranks.block.num_places and len(held) == ranks.block.num_blocks
        session.held = held if is_same and ranks.have_all else ranks.blocks()
        session.stopping.reasons = reasons
        session.stopping.best, session.stopping.best_epoch = best["best"], best["best_epoch"]
        for k, generator in enumerate(session.batches.generators):
            generator.set_state(tensors[f"generator.{k}"])
        # Where ranks have measured the same call, each goes on with its own plan of it.
        for each in known[ranks.block.place :][:1] if is_same else known:
            plans.from_dict(each, str(self.path))

    def _check(self, session: Session, tensors: Mapping[str, Tensor], facts: Any) -> None:
        if facts["format"] != _FORMAT:
            raise CheckpointError(
                f"{self.path} has format {facts['format']!r}, this version reads {_FORMAT}"
            )
        before, now = from_plain(facts["settings"]), session.settings
        lines = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if len(facts["schedulers"]) != len(session.schedule.schedulers):
            counts = len(facts["schedulers"]), len(session.schedule.schedulers)
            lines.append(f"there were {counts[0]} schedulers and are {counts[1]}")
        own, theirs = _own(session.ens), _part(tensors, "ensemble.")
        for name in sorted({*own, *theirs}):
            shapes = [tuple(t[name].shape) if name in t else None for t in (theirs, own)]
            if shapes[0] != shapes[1]:
                lines.append(f"`{name}` had shape {shapes[0]} and has {shapes[1]}")
        if lines:
            listed = "\n  ".join(lines[:10])
            more = f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else ""
            raise CheckpointError(
                f"fit: {self.path} is a checkpoint of another training:\n\n  {listed}{more}\n\n"
                f"Go on with the same settings, or start anew with another checkpoint="
            )

    def _tell_what_is_left_out(self, ens: Ensemble) -> None:
        names = sorted(ens.stacked_tensors().keys() - _own(ens).keys())
        if names and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"fit: the checkpoint leaves out what forward keeps in plain attributes"
                f" ({', '.join(f'`{name}`' for name in names)}); make it a buffer",
                EnsembleWarning,
                stacklevel=caller_level(),
            )


def _own(ens: Ensemble) -> dict[str, Tensor]:
    """Parameters and buffers of all members, and those that they share."""
    registered = {
        *dict(ens.members.named_parameters()),
        *dict(ens.members.named_buffers()),
    }
    stacked = {n: t for n, t in ens.stacked_tensors().items() if n in registered}
    return {**stacked, **shared_tensors(ens)}


@torch.no_grad()
def _put(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give the tensors these values, in the order in memory that they come in."""
    for name, tensor in own.items():
        value = values[name].to(tensor.device, tensor.dtype)
        if value.stride() == tensor.stride():
            tensor.copy_(value)
        else:
            tensor.data = value


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _tensors(session: Session) -> dict[str, Tensor]:
    """All tensors of a training, by the names that they have in the file."""
    return {
        **{f"ensemble.{name}": t for name, t in _own(session.ens).items()},
        **{f"best.{name}": t for name, t in session.best.items()},
        **{
            f"optimizer.{k}.{key}": value
            for k, values in session.optimizer.state_dict()["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        },
        **{
            f"generator.{k}": generator.get_state()
            for k, generator in enumerate(session.batches.generators)
        },
        **{f"history.{name}": torch.from_numpy(a) for name, a in _arrays(session).items()},
    }


def _stacked(names: Iterable[str], session: Session) -> set[str]:
    """Those of `_tensors` that have a row for each member at home."""
    shared = {id(tensor) for tensor in shared_tensors(session.ens).values()}
    parameters = [p for group in session.optimizer.param_groups for p in group["params"]]
    own = [f"optimizer.{k}." for k, p in enumerate(parameters) if id(p) not in shared]
    rows = session.ens.stacked_tensors()
    exact = {f"{kind}.{name}" for kind in ("ensemble", "best") for name in rows}
    return {name for name in names if name in exact or name.startswith(tuple(own))}


def _optimizer_state(tensors: Mapping[str, Tensor], groups: Any) -> dict[str, Any]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _part(tensors, "optimizer.").items():
        place, _, key = name.partition(".")
        state.setdefault(int(place), {})[key] = tensor
    return {"state": state, "param_groups": groups}


def _arrays(session: Session) -> dict[str, Array]:
    """The history and the early stopping, as arrays."""
    records = session.records
    found: dict[str, Array] = {
        "loss": np.stack([record.loss for record in records]),
        "lr": np.stack([record.lr for record in records]),
        "seconds": np.array([record.seconds for record in records]),
        "best": session.stopping.best,
        "best_epoch": session.stopping.best_epoch,
    }
    validations = [record.validation for record in records if record.validation is not None]
    if validations:
        found["validation.loss"] = np.stack([v.loss for v in validations])
        found["validation.combined_loss"] = np.array([v.combined_loss for v in validations])
        for name in validations[0].metrics:
            found[f"metric.{name}"] = np.stack([v.metrics[name] for v in validations])
            together = [v.combined_metrics[name] for v in validations]
            found[f"combined_metric.{name}"] = np.array(together)
    return found


def _records(tensors: Mapping[str, Tensor], metrics: list[str]) -> list[EpochRecord]:
    """Undo `_arrays`."""
    found = {name: tensor.numpy() for name, tensor in _part(tensors, "history.").items()}

    def validation(k: int) -> Validation | None:
        if "validation.loss" not in found:
            return None
        return Validation(
            found["validation.loss"][k],
            {name: found[f"metric.{name}"][k] for name in metrics},
            float(found["validation.combined_loss"][k]),
            {name: float(found[f"combined_metric.{name}"][k]) for name in metrics},
        )

    return [
        EpochRecord(found["loss"][k], found["lr"][k], float(found["seconds"][k]), validation(k))
        for k in range(len(found["loss"]))
    ]
