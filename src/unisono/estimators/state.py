"""A fitted estimator as plain JSON and tensors, and back: nothing in them is ever executed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from unisono.errors import CheckpointError
from unisono.estimators.classifier import EnsembleClassifier
from unisono.estimators.members import Factory
from unisono.estimators.moments import Moments
from unisono.estimators.plain import (
    array_from,
    history_from,
    plain_array,
    plain_history,
    plain_params,
)
from unisono.estimators.regressor import EnsembleRegressor
from unisono.estimators.stored import (
    CLASSIFIER,
    FORMAT,
    REGRESSOR,
    StoredMembers,
    moments_from,
    read_members,
    read_params,
)

Estimator = EnsembleClassifier | EnsembleRegressor

_KINDS: Final[Mapping[str, type[Estimator]]] = {
    CLASSIFIER: EnsembleClassifier,
    REGRESSOR: EnsembleRegressor,
}


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
        "format": FORMAT,
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
    members = read_members(config, tensors, module=module)
    try:
        params = read_params(config)
        try:
            estimator = _KINDS[config["kind"]](module, **params)
        except TypeError as error:
            raise CheckpointError(
                f"from_state: params aren't those of {config['kind']}: {error}"
            ) from None
        _restore(estimator, members, config, tensors)
    except KeyError as error:
        raise CheckpointError(f"from_state: config has no {error}") from None
    return estimator


def _restore(
    estimator: Estimator,
    members: StoredMembers,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    estimator.n_features_in_ = members.n_features
    if config["feature_names"] is not None:
        estimator.feature_names_in_ = np.array(config["feature_names"], dtype=object)
    estimator._seed, estimator._calls = config["seed"], config["calls"]
    estimator._is_gaussian, estimator._n_outputs = members.is_gaussian, config["n_outputs"]
    estimator._optimizer = None
    estimator._moments = moments_from("features", tensors)
    if isinstance(estimator, EnsembleClassifier):
        classes = [array_from(own) for own in config["classes"]]
        estimator.classes_ = classes[0] if members.is_single else classes
    else:
        estimator._is_single = members.is_single
        estimator._target_moments = members.targets
        estimator._set_target_scale()
    estimator.ensemble_ = members.ensemble
    estimator.history_ = history_from(config["history"])


def _moment_tensors(name: str, own: Moments | None) -> dict[str, Tensor]:
    assert own is not None
    return {
        f"{name}.weight": torch.tensor(own.weight, dtype=torch.float64),
        f"{name}.mean": torch.tensor(own.mean, dtype=torch.float64),
        f"{name}.std": torch.tensor(own.std, dtype=torch.float64),
    }
