"""The ensemble of a run on a table: made and trained, asked for every member, stored, loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from unisono.commands.models import describe, load_factory
from unisono.commands.outcome import ArgumentError
from unisono.commands.run_folder import MODEL, RunFolder
from unisono.errors import CheckpointError, EnsembleWarning, IncompatibleMembersError
from unisono.estimators.stored import StoredMembers, read_members

if TYPE_CHECKING:
    from unisono.estimators import EnsembleClassifier, EnsembleRegressor

DEFAULT: Final = "mlp"


@dataclass(frozen=True)
class TableSettings:
    """How to train on a table.

    Args:
        task: ``"classification"`` or ``"regression"``.
        model: ``mlp`` or ``package.module:factory``.
        members: Number of models.
        epochs: How often every member sees its rows, at most.
        seed: Where all randomness starts.
        rates: Learning rate of AdamW, one for each member.
        batch_size: Rows per minibatch, at most.
        device: Where to train.
        sampling: Which rows each member sees.
        patience: Epochs without a lower validation loss after which a member stops; None to
            train all epochs on all rows.
    """

    task: str
    model: str
    members: int
    epochs: int
    seed: int
    rates: tuple[float, ...]
    batch_size: int
    device: torch.device
    sampling: str
    patience: int | None


def choose_table_factory(spec: str) -> Callable[..., Any] | None:
    """Turn the value of ``--model`` into what the estimator takes.

    Raises:
        ArgumentError: If there is no such factory.

    Example:
        >>> choose_table_factory("mlp") is None
        True
    """
    if spec == DEFAULT:
        return None
    if ":" not in spec:
        raise ArgumentError(
            f"unknown model {spec!r} for a table; choose {DEFAULT} or package.module:factory"
        )
    return load_factory(spec)


def train_estimator(
    settings: TableSettings,
    module: Callable[..., Any] | None,
    features: NDArray[np.float32],
    values: NDArray[Any],
    *,
    verbose: bool,
) -> EnsembleClassifier | EnsembleRegressor:
    """Train an estimator on prepared rows.

    Args:
        settings: How.
        module: The user's factory; None for the default network.
        features: Of the training rows.
        values: Classes as indices, or numbers.
        verbose: Whether to show a progress bar.

    Shape:
        - features: ``(B, features)``
        - values: ``(B,)``

    Raises:
        ArgumentError: If the factory's modules don't suit the data.
    """
    from unisono.estimators import EnsembleClassifier, EnsembleRegressor

    kind = EnsembleClassifier if settings.task == "classification" else EnsembleRegressor
    same = len(set(settings.rates)) == 1
    estimator = kind(
        module,
        n_members=settings.members,
        sampling=settings.sampling,
        learning_rate=settings.rates[0] if same else list(settings.rates),
        batch_size=settings.batch_size,
        max_epochs=settings.epochs,
        patience=settings.patience,
        random_state=settings.seed % 2**32,  # all that NumPy's generator takes
        device=str(settings.device),
        verbose=verbose,
    )
    with warnings.catch_warnings():
        # Who stopped, and why, stands in the report.
        warnings.filterwarnings("ignore", message="fit: in epoch", category=EnsembleWarning)
        if module is None:
            return estimator.fit(features, values)
        try:
            return estimator.fit(features, values)
        except IncompatibleMembersError as error:
            first = "; ".join(str(difference) for difference in error.differences[:1])
            raise ArgumentError(
                f"--model {settings.model}: it must make the same architecture each time: {first}"
            ) from error
        except Exception as error:  # the user's module may do anything
            raise ArgumentError(f"--model {settings.model}: {describe(error)}") from error


def member_outputs(
    estimator: EnsembleClassifier | EnsembleRegressor, features: NDArray[np.float32]
) -> Tensor:
    """What every member says: logits, or mean and log-variance in the target's unit.

    Shape:
        - features: ``(B, features)``
        - output: ``(N, B, classes)``; ``(N, B, 2)`` for regression, ``(N, B, 1)`` if the members
          predict points. float64.
    """
    found = estimator.predict_members(features)
    if not isinstance(found, tuple):
        return torch.from_numpy(np.ascontiguousarray(found)).double()
    mean, variance = found
    parts = [mean] if variance is None else [mean, np.log(variance)]
    return torch.from_numpy(np.stack(parts, axis=-1)).double()


def pack_estimator(
    estimator: EnsembleClassifier | EnsembleRegressor,
) -> tuple[dict[str, Any], bytes]:
    """Return the plain values of a fitted estimator, and the content of its safetensors file."""
    from unisono.estimators.state import to_state

    config, tensors = to_state(estimator)
    return config, safetensors.torch.save(tensors)


def load_members(folder: RunFolder, model: str | None, device: torch.device) -> StoredMembers:
    """Put the members of a run together again.

    Args:
        folder: The run.
        model: ``--model``, if it was given: a run names the user's factory, but a name in a
            file is no reason to import it.
        device: Where they are to predict.

    Raises:
        ArgumentError: If the factory isn't the one of the training, or the files are damaged.
    """
    own = folder.description.model
    if own != DEFAULT and model is None:
        raise ArgumentError(
            f"the members of {folder.path} are made by {own}; if you trust that code, add "
            f"--model {own}"
        )
    if model is not None and model != own:
        raise ArgumentError(f"--model {model}: the members of {folder.path} are made by {own}")
    module = None if model is None else choose_table_factory(model)
    tensors = folder.tensors(MODEL)
    try:
        members = read_members(folder.description.estimator, tensors, module=module)
    except (CheckpointError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise folder.damaged(MODEL, " ".join(str(error).split())) from error
    members.ensemble.to(device)
    return members
