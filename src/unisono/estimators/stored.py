"""The members of a stored estimator, to predict with: from plain JSON and tensors.

Nothing in them is ever executed, and nothing here needs scikit-learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from unisono.ensemble import Ensemble
from unisono.errors import CheckpointError
from unisono.estimators.members import Factory, check_device, new_members
from unisono.estimators.moments import Array, Moments
from unisono.estimators.predicting import predict_rows, value_uncertainty
from unisono.estimators.settings import DTYPES, Settings, check_settings
from unisono.training import sampling
from unisono.uncertainty import Uncertainty, classification

FORMAT: Final = 1
CLASSIFIER: Final = "EnsembleClassifier"
REGRESSOR: Final = "EnsembleRegressor"
_KINDS: Final = (CLASSIFIER, REGRESSOR)
_MEMBERS: Final = "members."


@dataclass(frozen=True, eq=False)
class StoredMembers:
    """Fitted members without their estimator.

    Args:
        ensemble: In eval mode.
        is_gaussian: Whether its members return mean and variance.
        n_features: Columns of a row.
        targets: Of a regressor, the moments of its targets; None for a classifier.
        is_single: Whether there is one target, without an axis of targets, or one label column.
    """

    ensemble: Ensemble
    is_gaussian: bool
    n_features: int
    targets: Moments | None
    is_single: bool

    def predict_uncertainty(self, x: Array) -> Uncertainty:
        """Predict as the estimator does: the same numbers, for one label column or any targets.

        Args:
            x: Finite numbers, float32 or float64.

        Raises:
            ValueError: If there are other columns than in the training, numbers aren't finite, or
                a classifier has several label columns.

        Shape:
            - x: (B, F)
            - returns: as of the estimator's method
        """
        if x.shape[1:] != (self.n_features,):
            raise ValueError(
                f"X has shape {x.shape}, but the members take {self.n_features} features"
            )
        if not np.isfinite(x).all():
            raise ValueError(f"X holds numbers that are not finite in {x.dtype}")
        if self.targets is None and not self.is_single:
            raise ValueError("the members predict several label columns, which takes from_state")
        if self.targets is None:
            return Uncertainty(*predict_rows(self.ensemble, x, classification))
        found = value_uncertainty(self.ensemble, x, self.targets.mean, self.targets.scale())
        return Uncertainty(*(own[:, 0] for own in found)) if self.is_single else found


def read_members(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, module: Factory | None = None
) -> StoredMembers:
    """Read what `to_state` returned, as far as it takes to predict; see `from_state`.

    Args:
        config: What `to_state` returned.
        tensors: Likewise.
        module: The factory that the estimator had, if it had one.

    Raises:
        CheckpointError: If the data are incomplete, of a newer version, or don't fit together, or
            a module is missing.

    Example:
        >>> read_members({"format": 1}, {})
        Traceback (most recent call last):
        unisono.errors.CheckpointError: from_state: config has no 'kind'
    """
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"from_state: config is of format {config.get('format')!r}, this version of unisono"
            f" reads {FORMAT}"
        )
    try:
        settings = _settings(config, module)
        is_classifier = config["kind"] == CLASSIFIER
        ens, is_gaussian = _members(config, tensors, settings, module)
        return StoredMembers(
            ens,
            is_gaussian,
            config["n_features"],
            None if is_classifier else moments_from("targets", tensors),
            config["is_single"],
        )
    except KeyError as error:
        raise CheckpointError(f"from_state: config has no {error}") from None


def read_params(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the estimator, all but ``module``."""
    params = {name: value for name, value in config["params"].items() if name != "module"}
    kinds: dict[str, Callable[..., sampling.Sampling]] = {
        "folds": sampling.folds,
        "subset": sampling.subset,
    }
    if isinstance(params["sampling"], Mapping):
        own = dict(params["sampling"])
        params["sampling"] = kinds[own.pop("name")](**own)
    if isinstance(params["hidden_layer_sizes"], list):
        params["hidden_layer_sizes"] = tuple(params["hidden_layer_sizes"])
    return params


def moments_from(name: str, tensors: Mapping[str, Tensor]) -> Moments:
    """The moments that are stored under a name.

    Raises:
        CheckpointError: If they aren't there, or no numbers.
    """
    missing = [key for key in ("weight", "mean", "std") if f"{name}.{key}" not in tensors]
    if missing:
        raise CheckpointError(
            f"from_state: tensors hold no {', '.join(f'{name}.{key}' for key in missing)}"
        )
    weight, mean, std = (tensors[f"{name}.{key}"].numpy() for key in ("weight", "mean", "std"))
    if not math.isfinite(float(weight)):
        raise CheckpointError(f"from_state: {name}.weight is {float(weight)}")
    return Moments(float(weight), np.array(mean, dtype=np.float64), np.array(std, dtype=np.float64))


def _settings(config: Mapping[str, Any], module: Factory | None) -> Settings:
    """Those of the estimator, for this machine."""
    kind, path = config["kind"], config["params"]["module"]
    if kind not in _KINDS:
        raise CheckpointError(
            f"from_state: kind is one of {', '.join(map(repr, _KINDS))}; got {kind!r}"
        )
    if path is not None and module is None:
        raise CheckpointError(
            f"from_state: the members are made by {path}, which is not imported on the word of a"
            f" file; if you trust it, import it and pass it: from_state(config, tensors,"
            f" module={path.rpartition(':')[2]})"
        )
    if path is None and module is not None:
        raise CheckpointError(
            "from_state: the members are the default network, but a module was given; leave it out"
        )
    if config["dtype"] not in DTYPES:
        raise CheckpointError(
            f"from_state: dtype is one of {', '.join(DTYPES)}; got {config['dtype']!r}"
        )
    try:
        settings = check_settings(f"{kind}.from_state", read_params(config))
    except ValueError as error:
        raise CheckpointError(f"from_state: params don't fit: {error}") from error
    return replace(
        settings,
        n_members=config["n_members"],
        dtype=DTYPES[config["dtype"]],
        device=_place(settings.device),
    )


def _members(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    settings: Settings,
    module: Factory | None,
) -> tuple[Ensemble, bool]:
    """The ensemble, and whether its members return mean and variance."""
    rows = np.zeros((2, config["n_features"]), str(config["dtype"]))
    try:
        ens, is_gaussian = new_members(
            f"{config['kind']}.from_state",
            module,
            settings,
            rows,
            config["n_outputs"],
            may_be_gaussian=config["kind"] == REGRESSOR,
            seed=config["seed"],
        )
        ens.load_state_dict({n: own for n, own in tensors.items() if n.startswith(_MEMBERS)})
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"from_state: the tensors don't fit the config: {error}") from error
    if is_gaussian != config["is_gaussian"]:
        raise CheckpointError(
            f"from_state: is_gaussian={config['is_gaussian']}, but that is not what the members"
            f" return"
        )
    return ens, is_gaussian


def _place(device: torch.device) -> torch.device:
    """The device, or the CPU where there is no such device."""
    try:
        check_device("from_state", device)
    except ValueError:
        return torch.device("cpu")
    return device
