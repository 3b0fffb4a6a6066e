"""A fitted estimator as plain JSON and tensors, and back: nothing in them is ever executed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from unisono.errors import CheckpointError
from unisono.estimators.classifier import EnsembleClassifier
from unisono.estimators.members import Factory, check_device
from unisono.estimators.moments import Moments
from unisono.estimators.plain import (
    array_from,
    history_from,
    plain_array,
    plain_history,
    plain_params,
)
from unisono.estimators.regressor import EnsembleRegressor
from unisono.estimators.settings import DTYPES
from unisono.training import sampling

Estimator = EnsembleClassifier | EnsembleRegressor

_FORMAT: Final = 1
_KINDS: Final[Mapping[str, type[Estimator]]] = {
    "EnsembleClassifier": EnsembleClassifier,
    "EnsembleRegressor": EnsembleRegressor,
}
_MEMBERS: Final = "members."


def to_state(estimator: Estimator) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Take a fitted estimator apart: ``from_state(*to_state(e))`` predicts the same, bit by bit.

    A ``module`` is stored by its import path, as text. The state of the optimizer isn't stored:
    `partial_fit` afterwards goes on from the same weights with new moments.

    Args:
        estimator: A fitted estimator.

    Returns:
        What JSON can hold, and copies of the tensors on the CPU, contiguous.

    Raises:
        ValueError: If it isn't fitted (scikit-learn's ``NotFittedError``), ``module`` has no
            import path, or the labels are of a kind that JSON can't hold.

    Example:
        >>> import json
        >>> import numpy as np
        >>> X, y = np.random.default_rng(0).normal(size=(20, 2)), ["a", "b"] * 10
        >>> model = EnsembleClassifier(n_members=2, max_epochs=1).fit(X, y)
        >>> config, tensors = to_state(model)
        >>> again = from_state(json.loads(json.dumps(config)), tensors)
        >>> bool((again.predict_proba(X) == model.predict_proba(X)).all())
        True
    """
    check_is_fitted(estimator, "ensemble_")
    ens = estimator.ensemble_
    config: dict[str, Any] = {
        "format": _FORMAT,
        "kind": type(estimator).__name__,
        "params": plain_params(estimator.get_params(deep=False)),
        "n_members": len(ens),
        "n_features": int(estimator.n_features_in_),
        "n_outputs": int(estimator._n_outputs),
        "feature_names": None,
        "dtype": str(next(ens.parameters()).dtype).removeprefix("torch."),
        "is_gaussian": estimator._is_gaussian,
        "seed": estimator._seed,
        "calls": estimator._calls,
        "history": plain_history(estimator.history_),
    }
    names = getattr(estimator, "feature_names_in_", None)
    if names is not None:
        config["feature_names"] = [str(name) for name in names]
    tensors = {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in ens.state_dict().items()
    }
    tensors |= _moment_tensors("features", estimator._moments)
    if isinstance(estimator, EnsembleClassifier):
        labels = estimator._labels
        config["classes"] = [plain_array(own) for own in labels.classes]
        config["is_single"] = labels.is_single
    else:
        config["is_single"] = estimator._is_single
        tensors |= _moment_tensors("targets", estimator._target_moments)
    return config, tensors


def from_state(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, module: Factory | None = None
) -> Estimator:
    """Put an estimator together again, the reverse of `to_state`.

    Nothing is imported because the data name it: an estimator with a ``module`` of its own takes it
    as an argument. If the device that it ran on isn't there, it runs on the CPU.

    Args:
        config: What `to_state` returned.
        tensors: Likewise.
        module: The factory that the estimator had, if it had one.

    Returns:
        The fitted estimator.

    Raises:
        CheckpointError: If the data are incomplete, of a newer version, or don't fit together, or
            a module is missing.

    Example:
        >>> from_state({"format": 1}, {})
        Traceback (most recent call last):
        unisono.errors.CheckpointError: from_state: config has no 'kind'
    """
    if config.get("format") != _FORMAT:
        raise CheckpointError(
            f"from_state: config is of format {config.get('format')!r}, this version of unisono"
            f" reads {_FORMAT}"
        )
    try:
        estimator = _make(config, module)
        _restore(estimator, config, tensors)
    except KeyError as error:
        raise CheckpointError(f"from_state: config has no {error}") from None
    return estimator


def _make(config: Mapping[str, Any], module: Factory | None) -> Estimator:
    kind = config["kind"]
    if kind not in _KINDS:
        raise CheckpointError(
            f"from_state: kind is one of {', '.join(map(repr, _KINDS))}; got {kind!r}"
        )
    params = dict(config["params"])
    path = params.pop("module")
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
    kinds: dict[str, Callable[..., sampling.Sampling]] = {
        "folds": sampling.folds,
        "subset": sampling.subset,
    }
    if isinstance(params["sampling"], Mapping):
        own = dict(params["sampling"])
        params["sampling"] = kinds[own.pop("name")](**own)
    for name in ("hidden_layer_sizes",):
        if isinstance(params[name], list):
            params[name] = tuple(params[name])
    try:
        return _KINDS[kind](module, **params)
    except TypeError as error:
        raise CheckpointError(f"from_state: params aren't those of {kind}: {error}") from None


def _restore(
    estimator: Estimator, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    if config["dtype"] not in DTYPES:
        raise CheckpointError(
            f"from_state: dtype is one of {', '.join(DTYPES)}; got {config['dtype']!r}"
        )
    estimator.n_features_in_ = config["n_features"]
    if config["feature_names"] is not None:
        estimator.feature_names_in_ = np.array(config["feature_names"], dtype=object)
    estimator._seed, estimator._calls = config["seed"], config["calls"]
    estimator._optimizer = None
    estimator._moments = _moments_from("features", tensors)
    if isinstance(estimator, EnsembleClassifier):
        classes = [array_from(own) for own in config["classes"]]
        estimator.classes_ = classes[0] if config["is_single"] else classes
    else:
        estimator._is_single = config["is_single"]
        estimator._target_moments = _moments_from("targets", tensors)
        estimator._set_target_scale()
    rows = np.zeros((2, config["n_features"]), str(config["dtype"]))
    weights = {name: tensor for name, tensor in tensors.items() if name.startswith(_MEMBERS)}
    try:
        settings = estimator._settings("from_state")
        settings = replace(
            settings,
            n_members=config["n_members"],
            dtype=DTYPES[config["dtype"]],
            device=_place(settings.device),
        )
        ens = estimator._build("from_state", settings, rows, config["n_outputs"])
        ens.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"from_state: the tensors don't fit the config: {error}") from error
    if estimator._is_gaussian != config["is_gaussian"]:
        raise CheckpointError(
            f"from_state: is_gaussian={config['is_gaussian']}, but that is not what the members"
            f" return"
        )
    estimator.ensemble_ = ens
    estimator.history_ = history_from(config["history"])


def _moment_tensors(name: str, own: Moments | None) -> dict[str, Tensor]:
    assert own is not None
    return {
        f"{name}.weight": torch.tensor(own.weight, dtype=torch.float64),
        f"{name}.mean": torch.tensor(own.mean, dtype=torch.float64),
        f"{name}.std": torch.tensor(own.std, dtype=torch.float64),
    }


def _moments_from(name: str, tensors: Mapping[str, Tensor]) -> Moments:
    missing = [key for key in ("weight", "mean", "std") if f"{name}.{key}" not in tensors]
    if missing:
        raise CheckpointError(
            f"from_state: tensors hold no {', '.join(f'{name}.{key}' for key in missing)}"
        )
    weight, mean, std = (tensors[f"{name}.{key}"].numpy() for key in ("weight", "mean", "std"))
    if not math.isfinite(float(weight)):
        raise CheckpointError(f"from_state: {name}.weight is {float(weight)}")
    return Moments(float(weight), np.array(mean, dtype=np.float64), np.array(std, dtype=np.float64))


def _place(device: torch.device) -> torch.device:
    """The device, or the CPU where there is no such device."""
    try:
        check_device("from_state", device)
    except ValueError:
        return torch.device("cpu")
    return device
