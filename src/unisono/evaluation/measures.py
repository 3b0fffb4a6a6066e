"""The metrics of one task, fed minibatch by minibatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torchmetrics import Metric

from unisono.collectives import gather_rows, member_group
from unisono.evaluation.classes import ClassReader
from unisono.evaluation.numbers import NumberReader
from unisono.evaluation.readings import Reader, Reading
from unisono.evaluation.result import Array, Evaluation, OutOfDistribution, Task
from unisono.evaluation.stacked_metrics import (
    R2,
    CalibrationError,
    EachMember,
    RowMean,
    Separation,
    mean_absolute_error,
    root_mean_squared_error,
)
from unisono.training.combined import Combine

READERS: Final[Mapping[Task, type[ClassReader | NumberReader]]] = {
    "classification": ClassReader,
    "regression": NumberReader,
}
# Those of predictions and targets. Others are means over the rows, which the reader names.
_OWN: Final[Mapping[Task, Mapping[str, Callable[[int], Metric]]]] = {
    "classification": {"ece": CalibrationError},
    "regression": {
        "rmse": root_mean_squared_error,
        "mae": mean_absolute_error,
        "r2": lambda size: R2(),
    },
}
# Entropies are below 16 nats; variances may have any unit.
_SCORES: Final[Mapping[Task, Mapping[str, int]]] = {
    "classification": {"octaves": 32, "lowest": -28},
    "regression": {"octaves": 128, "lowest": -64},
}
# As many bins for each member in both; of the combined prediction there is only one.
_BITS: Final[Mapping[Task, int]] = {"classification": 10, "regression": 8}
_ROW_MEANS: Final[Mapping[Task, tuple[str, ...]]] = {
    "classification": ("accuracy", "nll", "brier"),
    "regression": ("nll",),
}
_M = TypeVar("_M", bound=Metric)
_PARTS: Final = ("total", "aleatoric", "epistemic")


def built_in_names(task: Task) -> frozenset[str]:
    """Names that a metric of the caller can't have."""
    return frozenset({*_ROW_MEANS[task], *_OWN[task]})


class Measures:
    """All metrics of members and combined prediction; the size of their state is fixed.

    Args:
        task: What the outputs are.
        n: The number of members.
        weights: Their shares; None for equal ones.
        combine: See `evaluate`.
        mesh: The ranks that hold the other members; None for none.
        metrics: Name -> a metric of the caller.
        outside: Whether rows of another distribution come after the others.
    """

    def __init__(
        self,
        task: Task,
        n: int,
        *,
        weights: Tensor | None,
        combine: Combine | None,
        mesh: DeviceMesh | None = None,
        metrics: Mapping[str, Metric],
        outside: bool,
    ) -> None:
        self._task: Task = task
        self._n = n
        self._group = member_group("evaluate", mesh)
        self._reader: Reader = READERS[task](n, weights=weights, combine=combine, mesh=mesh)
        self._row_means: dict[str, RowMean] = {}
        self._metrics: dict[str, Metric] = {name: make(n + 1) for name, make in _OWN[task].items()}
        self._metrics |= {name: EachMember(name, metric, n + 1) for name, metric in metrics.items()}
        self._uncertainty = {False: RowMean(), True: RowMean()}
        self._rows = {False: 0, True: 0}
        range_, bits = _SCORES[task], _BITS[task]
        self._separation = Separation(3, bits=bits + 2, **range_) if outside else None
        self._own_separation = Separation(n, bits=bits, **range_) if outside else None
        self._states_own = True
        self._place = torch.device("cpu")

    def add(self, outputs: Any, targets: Any) -> None:
        """Measure a minibatch of the data."""
        reading = self._reader.read(outputs, targets)
        self._place = reading.predictions.device
        for name, values in reading.row_values.items():
            if name not in self._row_means:
                self._row_means[name] = RowMean()
            _on(values.device, self._row_means[name]).update(values)
        device = reading.predictions.device
        for metric in self._metrics.values():
            _on(device, metric).update(reading.predictions, reading.targets)
        self._add_uncertainty(reading, is_outside=False)

    def add_outside(self, outputs: Any) -> None:
        """Measure the uncertainty of a minibatch of another distribution."""
        self._add_uncertainty(self._reader.read(outputs, None), is_outside=True)

    def states(self) -> Iterable[Tensor]:
        """All tensors that are kept from one minibatch to the next."""
        metrics = [*self._row_means.values(), *self._metrics.values(), *self._uncertainty.values()]
        metrics += [each for each in (self._separation, self._own_separation) if each is not None]
        for metric in metrics:
            yield from (x for x in metric.metric_state.values() if isinstance(x, Tensor))

    def result(self) -> Evaluation:
        """Read all values from the device."""
        for is_outside, what in ((False, "data"), (True, "out_of_distribution")):
            if not self._rows[is_outside] and (self._separation is not None or not is_outside):
                raise ValueError(f"evaluate: {what} has no rows; is the loader's iterator used up?")
        self._reader.check()
        names = [name for name in _ROW_MEANS[self._task] if name in self._row_means]
        values = {name: _read(self._row_means[name]) for name in names}
        values |= {name: _read(metric) for name, metric in self._metrics.items()}
        return Evaluation(
            self._task,
            self._rows[False],
            self._of_all_members({name: found[:-1] for name, found in values.items()}),
            {name: float(found[-1]) for name, found in values.items()},
            self._mean_uncertainty(is_outside=False),
            self._outside(),
        )

    def _add_uncertainty(self, reading: Reading, *, is_outside: bool) -> None:
        device = reading.uncertainty.device
        self._rows[is_outside] += reading.predictions.shape[1]
        _on(device, self._uncertainty[is_outside]).update(reading.uncertainty)
        if self._separation is None or self._own_separation is None:
            return
        _on(device, self._separation).update(reading.uncertainty, is_outside)
        if reading.own is None:
            self._states_own = False
        else:
            _on(device, self._own_separation).update(reading.own, is_outside)

    def _of_all_members(self, values: Mapping[str, Tensor]) -> dict[str, Array]:
        """Values of this rank's members -> those of the members on all ranks, in one message."""
        if self._group is None:
            return {name: found.numpy() for name, found in values.items()}
        rows = torch.stack(list(values.values()), 1).to(self._place)
        columns = gather_rows(rows, self._group).cpu().numpy().T
        return dict(zip(values, columns, strict=True))

    def _mean_uncertainty(self, *, is_outside: bool) -> dict[str, float]:
        return dict(zip(_PARTS, _read(self._uncertainty[is_outside]).tolist(), strict=True))

    def _outside(self) -> OutOfDistribution | None:
        if self._separation is None or self._own_separation is None:
            return None
        return OutOfDistribution(
            auroc=dict(zip(_PARTS, _read(self._separation).tolist(), strict=True)),
            members=self._of_all_members({"": _read(self._own_separation)})[""]
            if self._states_own
            else None,
            uncertainty=self._mean_uncertainty(is_outside=True),
            rows=self._rows[True],
        )


def _on(device: torch.device, metric: _M) -> _M:
    """The metric on the device; moving it takes long, even to where it is."""
    return metric if metric.device == device else metric.to(device)


def _read(metric: Metric) -> Tensor:
    found: Tensor = metric.compute()
    # torchmetrics makes a number of a tensor with one entry.
    return found.detach().to("cpu", torch.float64).reshape(-1)
