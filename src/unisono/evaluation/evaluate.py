"""`evaluate`: every member and the combined prediction, measured in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader

from unisono.calibration import pool
from unisono.collectives import member_group
from unisono.combination import Combination
from unisono.distributed.gathering import gather
from unisono.ensemble import Ensemble
from unisono.evaluation.result import Evaluation, Task
from unisono.evaluation.undisturbed import device_of, undisturbed
from unisono.extras import require
from unisono.member_axis import shares
from unisono.training.batches import make_validation_batches
from unisono.training.combined import Combine
from unisono.training.loading import to_device
from unisono.training.steps import call, pair

if TYPE_CHECKING:
    from torchmetrics import Metric

_BATCH_SIZE: Final = 256


def evaluate(
    ens: Ensemble,
    data: Any,
    *,
    task: Task,
    metrics: Mapping[str, Metric | Callable[[], Metric]] | None = None,
    weights: Tensor | Sequence[float] | None = None,
    combine: Combine | None = None,
    convert: Callable[[Any], Any] | None = None,
    batch_size: int | None = None,
    out_of_distribution: Any = None,
    device: torch.device | str | None = None,
    mesh: DeviceMesh | None = None,
) -> Evaluation:
    """Measure every member and their combined prediction in one pass over the data.

    Classification gives ``accuracy``, ``nll`` (nats for each row), ``brier`` (summed over the
    classes, from 0 to 2) and ``ece`` (expected calibration error of the chosen class, 15 bins);
    regression ``rmse``, ``mae``, ``r2``, and ``nll`` if members return a mean and a variance. The
    combined prediction is the mean of the probabilities, or the mixture of the Gaussians; members
    are measured as they are.

    Memory doesn't grow with the data, and no minibatch waits for the device. The ensemble runs in
    eval mode without gradients; it and the global random state are afterwards as before, also
    after an exception.

    Args:
        ens: The ensemble.
        data: As for `fit`: a pair (inputs, targets) of tensors, a map-style `Dataset` of such
            pairs, or a `DataLoader`. Inputs in a tuple or list are several arguments of the model,
            in a dict keyword arguments.
        task: ``"classification"``: the ensemble returns logits, and targets are classes.
            ``"regression"``: it returns predictions of the targets' shape, or a pair of means and
            variances.
        metrics: Name -> a metric of `torchmetrics`, or a function that makes one; each member has a
            copy of it, and the combined prediction another. It gets probabilities or means, and
            targets. What it keeps in memory is its own affair.
        weights: One number per member, as for `combine.weighted`. By default the weights and
            temperatures of ``ens.combination``, or else equal weights.
        combine: Outputs of all members -> one prediction in the form that one member has, in place
            of the default. Uncertainty remains that of the mixture.
        convert: What the ensemble returns -> logits, predictions, or the pair; for models that
            return something else.
        batch_size: Rows in a minibatch, at most; 256 if it isn't given. A `DataLoader` has its own.
        out_of_distribution: Data of another distribution, as ``data`` or without targets: how well
            uncertainty separates them.
        device: Where the minibatches are moved; to the ensemble's device by default.
        mesh: The ranks that the members are spread over (see `unisono.distributed`). Every rank
            passes its own members and all of the data, and gets the evaluation of all members;
            ``combine`` gets the outputs of all.

    Returns:
        Metrics of each member and of all together, mean uncertainty, and the areas under the ROC
        curve of uncertainty as a detector of ``out_of_distribution``. Those are of histograms:
        scores within 0.4 % of each other may count as equal.

    Shape:
        - outputs for classification: logits (N, B, C, *) with targets (B, *)
        - outputs for regression: (N, B, *) with targets (B, *); with variances a pair of such

    Raises:
        ValueError: If an argument isn't possible, shapes don't fit, or there are no rows.
        TypeError: If one is of the wrong kind.
        MissingExtraError: If torchmetrics isn't installed.

    Example:
        >>> import torch, unisono
        >>> from unisono import Ensemble, evaluate
        >>> ens = Ensemble.build(lambda: torch.nn.Linear(3, 2), 4)
        >>> x, y = torch.randn(200, 3), torch.randint(2, (200,))
        >>> found = evaluate(ens, (x, y), task="classification", out_of_distribution=9 * x)
        >>> found.members["nll"].shape
        (4,)
        >>> assert found.combined["nll"] <= found.members["nll"].mean()

    References: Brier, "Verification of forecasts expressed in terms of probability", 1950; Guo et
    al., "On Calibration of Modern Neural Networks", 2017, https://arxiv.org/abs/1706.04599, for
    ``ece``; Lakshminarayanan et al. 2017, https://arxiv.org/abs/1612.01474.
    """
    require("torchmetrics", extra="metrics", purpose="evaluate")
    from unisono.evaluation.checks import check_evaluate, made
    from unisono.evaluation.measures import Measures

    metrics = {} if metrics is None else metrics
    check_evaluate(
        ens,
        task=task,
        metrics=metrics,
        functions={"combine": combine, "convert": convert},
        weights=weights,
    )
    place = device_of(ens) if device is None else torch.device(device)
    group = member_group("evaluate", mesh)
    if weights is None and combine is None:
        weights, combine = ens.combination.weights, _tempered(ens.combination, task, mesh)
    elif combine is not None and mesh is not None:
        combine = _of_all(combine, mesh)
    own = None
    if weights is not None:
        own = shares("evaluate", weights, torch.empty(len(ens), device=place), group)
    measures = Measures(
        task,
        len(ens),
        weights=own,
        combine=combine,
        mesh=mesh,
        metrics=made(metrics),
        outside=out_of_distribution is not None,
    )

    def outputs_of(inputs: Any) -> Any:
        outputs = call(ens, inputs)
        return outputs if convert is None else convert(outputs)

    with undisturbed(ens):
        for batch in _batches("data", data, batch_size, place):
            inputs, targets = pair(batch, "evaluate")
            measures.add(outputs_of(inputs), targets)
        if out_of_distribution is not None:
            name = "out_of_distribution"
            for batch in _batches(name, out_of_distribution, batch_size, place):
                measures.add_outside(outputs_of(_inputs_of(batch)))
    return measures.result()


def _batches(name: str, data: Any, batch_size: int | None, device: torch.device) -> Iterable[Any]:
    """Minibatches on the device; the data stay where they are."""
    rows = batch_size if isinstance(data, DataLoader) else batch_size or _BATCH_SIZE
    for batch in make_validation_batches(data, batch_size=rows, name=name):
        yield to_device(batch, device)


def _of_all(combine: Combine, mesh: DeviceMesh) -> Combine:
    """The caller's combination, of the outputs of the members on all ranks."""
    return lambda outputs: combine(gather(outputs, mesh))


def _tempered(fitted: Combination, task: Task, mesh: DeviceMesh | None) -> Combine | None:
    """The combination of logits by temperatures that were fitted; None where there are none."""
    has_none = fitted.temperatures is None and fitted.pooled_temperature is None
    if has_none or task != "classification":
        return None

    def combine(logits: Tensor) -> Tensor:
        pooled = pool(
            logits, weights=fitted.weights, temperatures=fitted.temperatures, dim=2, mesh=mesh
        )
        if fitted.pooled_temperature is None:
            return pooled
        return pooled / fitted.pooled_temperature.to(pooled)

    return combine


def _inputs_of(batch: Any) -> Any:
    """The inputs of a minibatch that may come without targets."""
    if isinstance(batch, tuple | list) and len(batch) == 1:  # what a TensorDataset of inputs gives
        return batch[0]
    if isinstance(batch, tuple | list):
        return pair(batch, "evaluate")[0]
    return batch
