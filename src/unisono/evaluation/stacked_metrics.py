"""Metrics of all predictions at once, with a state whose size doesn't grow with the rows.

Each is a metric of torchmetrics whose value has an entry for every member and a last one for all
together; none reads from the device before `compute`. Two of torchmetrics' own keep all rows
(calibration, AUROC) and one squares numbers whose mean it takes away later (R2); those are here.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric

from unisono.evaluation.readings import wide

_CONFIDENCE_BINS: Final = 15


class _Stacked(Metric):
    """What all of them share: members of several processes are not mixed."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)

    def _sums(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> None:
        """A state that begins with zeros; a single zero takes the shape of what is added to it."""
        self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")


class RowMean(_Stacked):
    """The mean over all rows of values (M, R)."""

    total: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._sums("total")
        self._sums("rows", dtype=torch.int64)

    def update(self, values: Tensor) -> None:
        """Add a minibatch: (M, R)."""
        self.total = self.total + wide(values).sum(1)
        self.rows = self.rows + values.shape[1]

    def compute(self) -> Tensor:
        """The means: (M)."""
        return self.total / self.rows


class Errors(_Stacked):
    """Root mean squared or mean absolute error, over all numbers of all rows.

    Args:
        metric: One of torchmetrics with an output for each prediction.
    """

    def __init__(self, metric: MeanSquaredError | MeanAbsoluteError) -> None:
        super().__init__()
        self.metric = metric

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a minibatch: (M, B, *) and (B, *)."""
        columns = wide(predictions).flatten(1).mT  # (rows, M)
        wanted = wide(targets).flatten().unsqueeze(1).expand_as(columns)
        self.metric.set_dtype(columns.dtype)
        self.metric.update(columns, wanted)

    def compute(self) -> Tensor:
        """The errors: (M)."""
        found: Tensor = self.metric.compute()
        return found


class R2(_Stacked):
    """Coefficient of determination: ``1 - sum (y - p)^2 / sum (y - mean y)^2``.

    Targets of several numbers have one each, of which the mean is taken, as in scikit-learn.
    """

    origin: Tensor
    total: Tensor
    squares: Tensor
    residual: Tensor
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("origin", "total", "squares", "residual"):
            self._sums(name)
        self._sums("rows", dtype=torch.int64)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a minibatch: (M, B, *) and (B, *)."""
        if not len(targets):
            return
        y = wide(targets).reshape(len(targets), -1)  # (B, D)
        p = wide(predictions).reshape(len(predictions), *y.shape)
        if self.origin.ndim == 0:
            # Squares of numbers far from zero would leave no digits for their spread.
            self.origin = y[0]
        around = y - self.origin
        self.total = self.total + around.sum(0)
        self.squares = self.squares + around.square().sum(0)
        self.residual = self.residual + (y - p).square().sum(1)  # (M, D)
        self.rows = self.rows + len(y)

    def compute(self) -> Tensor:
        """The coefficients: (M); NaN where all targets are equal."""
        spread = self.squares - self.total.square() / self.rows
        spread = spread.masked_fill(spread <= 0, torch.nan)
        return (1 - self.residual / spread).mean(1)


class CalibrationError(_Stacked):
    """Expected calibration error: ``sum_b |accuracy_b - confidence_b| rows_b / rows``.

    The number of torchmetrics' `MulticlassCalibrationError` with 15 bins and norm "l1", from sums.

    Args:
        size: M.
    """

    confidence: Tensor
    right: Tensor
    rows: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        for name in ("confidence", "right", "rows"):
            self._sums(name, size * (_CONFIDENCE_BINS + 1))

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a minibatch: probabilities (M, B, C, *) and classes (B, *)."""
        confidence, choice = (part.flatten(1) for part in predictions.max(2))  # (M, R)
        edges = torch.linspace(
            0, 1, _CONFIDENCE_BINS + 1, dtype=confidence.dtype, device=confidence.device
        )
        bins = (torch.bucketize(confidence, edges, right=True) - 1).clamp(0, _CONFIDENCE_BINS)
        places = _places(bins, _CONFIDENCE_BINS + 1)
        for name, values in (
            ("confidence", confidence),
            ("right", choice == targets.flatten()),
            ("rows", torch.ones_like(confidence)),
        ):
            values = wide(values).flatten()
            sums = getattr(self, name).to(values.dtype)
            setattr(self, name, sums.scatter_add(0, places, values))

    def compute(self) -> Tensor:
        """The errors: (M); NaN where a probability was NaN."""
        gaps = (self.right - self.confidence).reshape(self.size, -1).abs().sum(1)
        return gaps / self.rows.reshape(self.size, -1).sum(1)


class Separation(_Stacked):
    """Area under the ROC curve of scores that are to be larger for outsiders: P(outside > inside).

    From counts in bins on a logarithmic scale: scores in one bin count as equal, by one half. A bin
    holds the float32 that are equal after so many bits of the fraction: 10 bits are 0.1 %.

    Args:
        size: M, how many scores each row has; they are at least zero.
        bits: Of the fraction.
        octaves: Bins are for scores from ``2**lowest`` to ``2**(lowest + octaves)``.
        lowest: See ``octaves``.
    """

    inside: Tensor
    outside: Tensor
    broken: Tensor

    def __init__(self, size: int, *, bits: int, octaves: int, lowest: int) -> None:
        super().__init__()
        self.size = size
        self.bits = bits
        self.lowest = lowest
        self.bins = octaves << bits
        for name in ("inside", "outside"):
            self._sums(name, size * self.bins, dtype=torch.int64)
        self._sums("broken", size, dtype=torch.bool)

    def update(self, scores: Tensor, is_outside: bool) -> None:
        """Add scores (M, R) of rows that are all inside, or all outside."""
        # The bits of a float32 are in the order of the numbers: 8 for the exponent, 23 behind it.
        whole = scores.float().contiguous().view(torch.int32) >> (23 - self.bits)
        bins = whole - ((127 + self.lowest) << self.bits)
        places = _places(bins.clamp(0, self.bins - 1).long(), self.bins)
        name = "outside" if is_outside else "inside"
        counts = getattr(self, name)
        setattr(self, name, counts.scatter_add_(0, places, torch.ones_like(places)))
        self.broken = self.broken | scores.isnan().any(1)

    def compute(self) -> Tensor:
        """The areas: (M); NaN where a score was NaN."""
        inside, outside = (
            wide(counts.reshape(self.size, -1)) for counts in (self.inside, self.outside)
        )
        below = inside.cumsum(1) - inside / 2
        area = (outside * below).sum(1) / (inside.sum(1) * outside.sum(1))
        return area.masked_fill(self.broken, math.nan)


class EachMember(_Stacked):
    """A metric of the caller, of which each prediction has a copy.

    Args:
        name: What the caller calls it.
        metric: The metric; it is cloned.
        size: M.
    """

    def __init__(self, name: str, metric: Metric, size: int) -> None:
        super().__init__()
        self.name = name
        self.copies = [metric.clone() for _ in range(size)]
        for copy in self.copies:
            copy.reset()

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add a minibatch: (M, B, *) and (B, *)."""
        for copy, prediction in zip(self.copies, predictions, strict=True):
            if copy.device != prediction.device:
                copy.to(prediction.device)
            copy.update(prediction, targets)

    def compute(self) -> Tensor:
        """The values: (M)."""
        found: list[Any] = [copy.compute() for copy in self.copies]
        if not all(isinstance(value, Tensor) and value.numel() == 1 for value in found):
            value = found[0]
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"
            raise TypeError(
                f"evaluate: metrics[{self.name!r}] is to give one number for a member, got {got}; "
                f'average it, as by average="macro", or pass its parts as metrics of their own'
            )
        return torch.stack([wide(value.reshape(())) for value in found])


def _places(bins: Tensor, size: int) -> Tensor:
    """Bins (M, R) as places in the counts of all M, one behind the other."""
    offset = torch.arange(len(bins), device=bins.device).unsqueeze(1) * size
    return (bins + offset).flatten()


def root_mean_squared_error(size: int) -> Errors:
    """RMSE of M predictions."""
    return Errors(MeanSquaredError(squared=False, num_outputs=size, sync_on_compute=False))


def mean_absolute_error(size: int) -> Errors:
    """MAE of M predictions."""
    return Errors(MeanAbsoluteError(num_outputs=size, sync_on_compute=False))
