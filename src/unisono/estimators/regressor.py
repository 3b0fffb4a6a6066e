"""`EnsembleRegressor`: a deep ensemble as a scikit-learn regressor."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.utils.validation import column_or_1d
from torch import Tensor

from unisono.estimators.base import EnsembleEstimator
from unisono.estimators.losses import gaussian_loss, mixture_moments, point_loss
from unisono.estimators.moments import Array, Moments, merge, moments
from unisono.estimators.predicting import mean_of, value_uncertainty
from unisono.estimators.rows import check_weights, with_weight
from unisono.estimators.training import Task
from unisono.training.combined import mean_of_members
from unisono.uncertainty import Uncertainty


class EnsembleRegressor(RegressorMixin, EnsembleEstimator):  # type: ignore[misc]
    """N networks trained at once, ``predict(X) == mean_i mean of member_i(X)``.

    By default each member is a `GaussianMLP`, which standardises its inputs and predicts a mean and
    a variance; all together are the mixture of their Gaussians. Targets are standardised for the
    training, and what is predicted is in their own unit again. For the rest see
    `EnsembleClassifier`.

    Args:
        module: ``module(n_features, n_outputs)`` returns a new member, a `torch.nn.Module` that
            turns rows into predictions of the standardised targets: one tensor (B, n_outputs),
            which is trained on squared errors, or a pair of mean and variance of that shape; None
            for `GaussianMLP`. Put a `Standardise` in front if the columns have scales of their own.
        n_members: Number of members.
        sampling: Which rows each member sees: ``"shared"``, ``"shuffled"``, ``"bootstrap"``,
            ``"folds"``, or one of `unisono.sampling`.
        hidden_layer_sizes: Of the default network.
        dropout: Of the default network.
        learning_rate: One number, or a list of one per member.
        weight_decay: Likewise.
        batch_size: Rows of a minibatch, at most.
        max_epochs: How often each member goes through its rows, at most.
        validation_fraction: Part of the rows to stop by. If that makes fewer than 10 rows, none is
            held out and all epochs are trained.
        patience: Epochs without improvement after which a member stops; None to hold out nothing
            and train all epochs.
        min_delta: How much lower the loss on held-out rows has to be to count as an improvement.
        random_state: An integer for the same numbers each time, to the last bit on one machine with
            one number of threads. NumPy's global generator is drawn from if it is None, and no
            other global generator in any case.
        device: Where to train and predict.
        dtype: ``"float32"`` or ``"float64"``; None for that of X on a CPU, and float32 elsewhere.
        strategy: As for `unisono.Ensemble`. ``"auto"`` measures what is fastest, which is why the
            last digits may differ from one run to the next.
        verbose: Show a progress bar.

    Attributes:
        ensemble_: The `unisono.Ensemble`, in eval mode; it predicts standardised targets.
        history_: The `unisono.History` of the last training, of standardised targets.
        target_mean_: What is added to predictions, one number for each target.
        target_scale_: What they are multiplied by before.
        n_features_in_: Number of columns of X.
        feature_names_in_: Their names, if X had any.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = EnsembleRegressor(n_members=4, max_epochs=20, random_state=0).fit(X, y)
        >>> model.predict(X).shape
        (442,)
        >>> found = model.predict_uncertainty(X)
        >>> bool((found.aleatoric > 0).all())
        True

    Reference: Lakshminarayanan, Pritzel and Blundell, "Simple and Scalable Predictive Uncertainty
    Estimation using Deep Ensembles", 2017, https://arxiv.org/abs/1612.01474
    """

    target_mean_: Array
    target_scale_: Array
    _target_moments: Moments | None
    _is_single: bool  # whether y has no axis of targets
    _may_be_gaussian: ClassVar[bool] = True

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> EnsembleRegressor:
        """Train new members.

        Args:
            X: Finite numbers, an array or a DataFrame.
            y: Finite numbers, one target or several.
            sample_weight: One number for each row, none negative: a row of weight 2 counts like
                two, one of weight 0 isn't there. None for equal ones.

        Returns:
            This estimator.

        Shape:
            - X: (B, F)
            - y: (B) or (B, T)
            - sample_weight: (B)

        Raises:
            ValueError: If a parameter isn't possible, or X or y aren't finite.
        """
        settings = self._settings("fit")
        x, y, weights = self._checked("fit", X, y, sample_weight, reset=True)
        self._begin()
        self._is_single = y.ndim == 1
        self._target_moments = moments(y.reshape(len(y), -1), weights)
        self._set_target_scale()
        targets = self._standardised(y)
        keys = targets[:, 0] if targets.shape[1] == 1 else None
        self._fit_rows(settings, x, targets, weights, n_outputs=targets.shape[1], keys=keys)
        return self

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> EnsembleRegressor:
        """Go once through more rows; all members go on where they stand.

        The standardisation of X and y follows the rows that were seen. Nothing is held out. A
        weight is taken as it is: weights of 2 double the step that plain gradient descent would
        take.

        Args:
            X: As for `fit`.
            y: As for `fit`.
            sample_weight: As for `fit`.

        Returns:
            This estimator.

        Shape:
            - as for `fit`

        Raises:
            ValueError: As for `fit`; and if there are other columns than in the first call.
        """
        settings = self._settings("partial_fit")
        is_first = not hasattr(self, "ensemble_")
        x, y, weights = self._checked("partial_fit", X, y, sample_weight, reset=is_first)
        columns = y.reshape(len(y), -1)
        if is_first:
            self._is_single, self._target_moments = y.ndim == 1, None
        elif columns.shape[1] != len(self.target_mean_):
            raise ValueError(
                f"{self._call('partial_fit')}: y has {len(self.target_mean_)} targets in the first"
                f" call; got shape {y.shape}"
            )
        self._target_moments = merge(self._target_moments, moments(columns, weights))
        self._set_target_scale()
        targets = self._standardised(y)
        self._fit_more(settings, x, targets, weights, n_outputs=targets.shape[1])
        return self

    def predict(self, X: Any) -> Array:
        """Return the mean of the mixture of all members.

        Args:
            X: Rows with the columns of `fit`.

        Returns:
            Predictions in the unit of y, float64.

        Shape:
            - X: (B, F)
            - returns: (B) or (B, T)
        """
        (mean,) = self._predict_rows(X, lambda outputs: [mean_of(outputs).mean(0)])
        return self._in_unit(mean)

    def predict_uncertainty(self, X: Any) -> Uncertainty:
        """Return predictions and how much of their variance is the members' disagreement.

        See `unisono.uncertainty.regression`. Members that predict points state no variance, so
        `aleatoric` is zero.

        Args:
            X: Rows with the columns of `fit`.

        Returns:
            An `Uncertainty` of arrays: `prediction` as `predict`; `total`, `aleatoric` and
            `epistemic` are variances in the squared unit of y.

        Shape:
            - X: (B, F)
            - each: (B) or (B, T)
        """
        x = self._check_x(X)  # first, for its error if there is no ensemble yet
        found = value_uncertainty(self.ensemble_, x, self.target_mean_, self.target_scale_)
        return Uncertainty(*map(self._without_axis, found))

    def predict_members(self, X: Any) -> tuple[Array, Array | None]:
        """Return the mean and the variance that every member predicts.

        Args:
            X: Rows with the columns of `fit`.

        Returns:
            Means in the unit of y, and variances in its square; None for members that predict
            points.

        Shape:
            - X: (B, F)
            - each: (N, B) or (N, B, T)
        """

        def parts(outputs: Any) -> list[Tensor]:
            tensors = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            return [each.movedim(0, 1) for each in tensors]

        mean, *variance = (np.moveaxis(own, 1, 0) for own in self._predict_rows(X, parts))
        return self._in_unit(mean), self._in_squared_unit(variance[0]) if variance else None

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _task(self, *, weighted: bool) -> Task:
        if self._is_gaussian:
            return Task(gaussian_loss(weighted=weighted), mixture_moments)
        return Task(point_loss(weighted=weighted), mean_of_members)

    def _checked(
        self, method: str, x: Any, y: Any, weights: Any, *, reset: bool
    ) -> tuple[Array, Array, Array | None]:
        """The rows that count."""
        x, y = self._check_xy(x, y, reset=reset, numeric=True)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        return with_weight(x, y, check_weights(self._call(method), weights, len(x)))

    def _set_target_scale(self) -> None:
        assert self._target_moments is not None
        self.target_mean_ = self._target_moments.mean
        self.target_scale_ = self._target_moments.scale()

    def _standardised(self, y: Array) -> Array:
        """(B) or (B, T) -> (B, T)."""
        found: Array = (y.reshape(len(y), -1) - self.target_mean_) / self.target_scale_
        return found

    def _in_unit(self, mean: Array) -> Array:
        return self._without_axis(mean * self.target_scale_ + self.target_mean_)

    def _in_squared_unit(self, variance: Array) -> Array:
        return self._without_axis(variance * np.square(self.target_scale_))

    def _without_axis(self, values: Array) -> Array:
        """Without the axis of the targets if y had none."""
        return values[..., 0] if self._is_single else values
