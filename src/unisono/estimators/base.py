"""What both estimators do alike: parameters, the steps of a fit, prediction of all rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from unisono.engine.planning.plan import StrategyName
from unisono.ensemble import Ensemble
from unisono.estimators.members import Factory, new_members, standardise_by
from unisono.estimators.moments import Array, Moments, merge, moments
from unisono.estimators.predicting import in_precision, predict_rows
from unisono.estimators.settings import Settings, check_settings
from unisono.estimators.training import Data, Task, make_optimizer, mean_one, train, train_on
from unisono.optim import MemberOptimizer
from unisono.training.history import History
from unisono.training.sampling import Sampling


class EnsembleEstimator(BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """The common part of `EnsembleClassifier` and `EnsembleRegressor`; see there."""

    ensemble_: Ensemble
    history_: History
    n_features_in_: int
    _is_gaussian: bool
    _n_outputs: int
    _moments: Moments | None
    _optimizer: MemberOptimizer | None
    _seed: int
    _calls: int
    _may_be_gaussian: ClassVar[bool] = False

    def __init__(
        self,
        module: Factory | None = None,
        *,
        n_members: int = 10,
        sampling: str | Sampling = "shuffled",
        hidden_layer_sizes: Sequence[int] = (64, 64),
        dropout: float = 0.0,
        learning_rate: float | Sequence[float] = 3e-3,
        weight_decay: float | Sequence[float] = 0.1,
        batch_size: int = 64,
        max_epochs: int = 100,
        validation_fraction: float = 0.1,
        patience: int | None = 5,
        min_delta: float = 2e-3,
        random_state: Any = None,
        device: str | torch.device = "cpu",
        dtype: str | None = None,
        strategy: StrategyName = "fused",
        verbose: bool = False,
    ) -> None:
        self.module = module
        self.n_members = n_members
        self.sampling = sampling
        self.hidden_layer_sizes = hidden_layer_sizes
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.validation_fraction = validation_fraction
        self.patience = patience
        self.min_delta = min_delta
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.strategy = strategy
        self.verbose = verbose

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: with the ensemble on the CPU, so that any machine can load it."""
        state: dict[str, Any] = super().__getstate__()
        ens = state.get("ensemble_")
        if ens is not None and next(ens.parameters()).device.type != "cpu":
            # The optimizer is that of the ensemble on the device; `partial_fit` makes a new one.
            state = {**state, "ensemble_": copy.deepcopy(ens).cpu(), "_optimizer": None}
        return state

    def _task(self, *, weighted: bool) -> Task:
        """What members learn."""
        raise NotImplementedError

    def _call(self, method: str) -> str:
        return f"{type(self).__name__}.{method}"

    def _settings(self, method: str) -> Settings:
        return check_settings(self._call(method), self.get_params(deep=False))

    def _check_xy(self, x: Any, y: Any, *, reset: bool, numeric: bool) -> tuple[Array, Array]:
        found: tuple[Array, Array] = validate_data(
            self,
            x,
            y,
            reset=reset,
            dtype=(np.float64, np.float32),
            multi_output=True,
            y_numeric=numeric,
        )
        return found

    def _check_x(self, x: Any) -> Array:
        check_is_fitted(self, "ensemble_")
        found: Array = validate_data(self, x, reset=False, dtype=(np.float64, np.float32))
        return found

    def _build(self, method: str, settings: Settings, x: Array, n_outputs: int) -> Ensemble:
        """New members for rows like these."""
        ens, self._is_gaussian = new_members(
            self._call(method),
            self.module,
            settings,
            x,
            n_outputs,
            may_be_gaussian=self._may_be_gaussian,
            seed=self._seed,
        )
        self._n_outputs = n_outputs
        return ens

    def _begin(self) -> None:
        """Forget old members: a fit that doesn't end leaves an estimator that isn't fitted."""
        self.__dict__.pop("ensemble_", None)
        self._seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def _fit_rows(
        self,
        settings: Settings,
        x: Array,
        y: Array,
        weights: Array | None,
        *,
        n_outputs: int,
        keys: Array | None,
    ) -> None:
        """Train new members on rows of positive weight.

        Args:
            settings: The parameters.
            x: Features.
            y: Targets as the loss takes them.
            weights: Positive weights.
            n_outputs: Of a member.
            keys: See `hold_out`.
        """
        ens = self._build("fit", settings, x, n_outputs)
        self._moments = moments(x, weights)
        standardise_by(ens, self._moments)
        own = mean_one(weights)
        data = Data(_as(x, settings.dtype_for(x)), _as(y, settings.dtype_for(x)), own)
        task = self._task(weighted=own is not None)
        self.history_ = train(ens, data, task, settings, keys, self._seed)
        self.ensemble_ = ens
        self._optimizer = None
        self._calls = 0

    def _fit_more(
        self, settings: Settings, x: Array, y: Array, weights: Array | None, *, n_outputs: int
    ) -> None:
        """Go once through rows of positive weight, with new members if there are none yet."""
        if not hasattr(self, "ensemble_"):
            self._begin()
            self.ensemble_ = self._build("partial_fit", settings, x, n_outputs)
            self._optimizer = None
            self._moments, self._calls = None, 0
        if self._optimizer is None:
            self._optimizer = make_optimizer(self.ensemble_, settings)
        self._moments = merge(self._moments, moments(x, weights))
        standardise_by(self.ensemble_, self._moments)
        dtype = next(self.ensemble_.parameters()).dtype
        data = Data(_as(x, dtype), _as(y, dtype), weights)
        task = self._task(weighted=weights is not None)
        self._calls += 1
        seed = int(np.random.SeedSequence([self._seed, self._calls]).generate_state(1)[0])
        self.history_ = train_on(self.ensemble_, self._optimizer, data, task, settings, seed)

    def _predict_rows(self, x: Any, what: Callable[[Any], Sequence[Tensor]]) -> tuple[Array, ...]:
        x = self._check_x(x)  # first, for its error if there is no ensemble yet
        return predict_rows(self.ensemble_, x, what)


def _as(values: Array, dtype: torch.dtype) -> Array:
    """Real numbers in the dtype of the network; whole numbers, as classes are, stay."""
    if values.dtype.kind != "f":
        return values
    return in_precision(values, np.float32 if dtype == torch.float32 else np.float64)
