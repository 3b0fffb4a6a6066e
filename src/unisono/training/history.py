"""What a training leaves: losses, metrics and rates of each epoch and member, as arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = np.ndarray[Any, np.dtype[Any]]
Stop = Literal["", "patience", "not finite"]
"""Why a member stopped before the last epoch; empty if it didn't."""


@dataclass(frozen=True, eq=False)
class Validation:
    """One pass over the validation data.

    Args:
        loss: Each member's mean loss; NaN where the member has stopped.
        metrics: Name -> each member's value.
        combined_loss: Mean loss of the combined prediction of all members.
        combined_metrics: Name -> value of the combined prediction.

    Shape:
        - loss, each of metrics: (N)
    """

    loss: Array
    metrics: Mapping[str, Array]
    combined_loss: float
    combined_metrics: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class EpochRecord:
    """One epoch.

    Args:
        loss: Each member's mean training loss; NaN where the member had stopped before.
        lr: Each member's learning rate.
        seconds: Duration, validation included.
        validation: None without validation data.

    Shape:
        - loss, lr: (N)
    """

    loss: Array
    lr: Array
    seconds: float
    validation: Validation | None = None


@dataclass(frozen=True, eq=False)
class History:
    """How a training went, epoch by epoch and member by member.

    A member that stopped early has NaN from then on.

    Args:
        loss: Mean training loss.
        lr: Learning rates.
        seconds: Duration of each epoch.
        validation_loss: Mean validation loss; None without validation data.
        combined_loss: The same of the members' combined prediction.
        metrics: Name -> each member's value on the validation data.
        combined_metrics: Name -> the value of the combined prediction.
        best_epoch: The epoch of each member's lowest validation loss, counted from 0; -1 if there
            was none.
        stopped: For each member why it stopped before the last epoch: ``"patience"``, ``"not
            finite"``, or ``""``.
        held_out: For each member the rows of the data that its sampling kept from it; empty
            where it sees all.

    Shape:
        - loss, lr, validation_loss, each of metrics: (epochs, N)
        - seconds, combined_loss, each of combined_metrics: (epochs)
        - best_epoch: (N)

    Example:
        >>> import torch
        >>> from unisono import Ensemble, fit, optim
        >>> ens = Ensemble.build(lambda: torch.nn.Linear(3, 1), 4)
        >>> x, y = torch.randn(20, 3), torch.randn(20, 1)
        >>> loss = torch.nn.functional.mse_loss
        >>> sgd = optim.SGD(ens, lr=0.1)
        >>> history = fit(ens, (x, y), loss=loss, optimizer=sgd, epochs=2, progress=False)
        >>> history.loss.shape, history.stopped
        ((2, 4), ('', '', '', ''))
    """

    loss: Array
    lr: Array
    seconds: Array
    validation_loss: Array | None
    combined_loss: Array | None
    metrics: Mapping[str, Array]
    combined_metrics: Mapping[str, Array]
    best_epoch: Array
    stopped: tuple[Stop, ...]
    held_out: tuple[Array, ...] = field(default=())

    @property
    def epochs(self) -> int:
        """Number of epochs that were trained."""
        return len(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """Lists and numbers, ready for JSON; None stands for what isn't finite."""
        arrays = {
            name: _plain(getattr(self, name))
            for name in ("loss", "lr", "seconds", "validation_loss", "combined_loss", "best_epoch")
        }
        return {
            **arrays,
            "metrics": {name: _plain(values) for name, values in self.metrics.items()},
            "combined_metrics": {
                name: _plain(values) for name, values in self.combined_metrics.items()
            },
            "stopped": list(self.stopped),
            "held_out": [_plain(rows) for rows in self.held_out],
        }

    def plot(self) -> Axes:
        """Draw the losses over the epochs: every member, their mean, the combined prediction.

        Returns:
            Matplotlib's axes; their ``.figure`` is new, not shown and not saved.

        Raises:
            MissingExtraError: If Matplotlib isn't installed.
        """
        from unisono.plots import learning_curves

        return learning_curves(
            self.loss, validation_loss=self.validation_loss, combined_loss=self.combined_loss
        )

    def __repr__(self) -> str:
        """The epochs, and where the losses ended."""
        parts = [f"{self.epochs} epochs", f"{len(self.best_epoch)} members"]
        parts += [f"{name} {_spread(found)}" for name, found in self._last().items()]
        count = {why: self.stopped.count(why) for why in ("patience", "not finite")}
        parts += [f"{n} stopped: {why}" for why, n in count.items() if n]
        return f"History({', '.join(parts)})"

    def _last(self) -> dict[str, Array]:
        """Each member's last losses."""
        found = {"loss": self.loss, "validation_loss": self.validation_loss}
        return {
            name: np.array([_last_number(column) for column in values.T])
            for name, values in found.items()
            if values is not None and len(values)
        }


def make_history(
    records: Sequence[EpochRecord],
    *,
    best_epoch: Array,
    stopped: Sequence[Stop],
    held_out: Sequence[Array] = (),
) -> History:
    """Put the records of the epochs together."""
    n = len(stopped)
    validations = [record.validation for record in records if record.validation is not None]
    names = list(validations[0].metrics) if validations else []
    return History(
        loss=_table([record.loss for record in records], n),
        lr=_table([record.lr for record in records], n),
        seconds=np.array([record.seconds for record in records]),
        validation_loss=_table([v.loss for v in validations], n) if validations else None,
        combined_loss=np.array([v.combined_loss for v in validations]) if validations else None,
        metrics={name: _table([v.metrics[name] for v in validations], n) for name in names},
        combined_metrics={
            name: np.array([v.combined_metrics[name] for v in validations]) for name in names
        },
        best_epoch=best_epoch,
        stopped=tuple(stopped),
        held_out=tuple(held_out),
    )


def _table(rows: Sequence[Array], n: int) -> Array:
    return np.stack(rows) if rows else np.empty((0, n))


def _plain(values: Array | None) -> Any:
    if values is None:
        return None
    if values.dtype.kind != "f":
        return values.tolist()
    found = values.astype(object)
    found[~np.isfinite(values)] = None
    return found.tolist()


def _last_number(column: Array) -> float:
    known = column[~np.isnan(column)]
    return float(known[-1]) if len(known) else math.nan


def _spread(values: Array) -> str:
    known = values[~np.isnan(values)]
    if not len(known):
        return "nan"
    return f"{known.mean():.4g} [{known.min():.4g} .. {known.max():.4g}]"
