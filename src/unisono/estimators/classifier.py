"""`EnsembleClassifier`: a deep ensemble as a scikit-learn classifier."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d
from torch import Tensor

from unisono import combine
from unisono.estimators.base import EnsembleEstimator
from unisono.estimators.labels import Labels, check_classes, labels_of
from unisono.estimators.losses import class_loss, mean_probabilities
from unisono.estimators.moments import Array
from unisono.estimators.rows import check_weights, with_weight
from unisono.estimators.training import Task
from unisono.uncertainty import Uncertainty, classification


class EnsembleClassifier(ClassifierMixin, EnsembleEstimator):  # type: ignore[misc]
    """N networks trained at once, ``predict_proba(X) == mean_i softmax(member_i(X))``.

    By default each member is a `TabularMLP`, which standardises its inputs, with initial weights
    and an order of the rows of its own. Training is that of `unisono.fit` with
    `unisono.optim.AdamW`; a member stops when its loss on held-out rows gets no better, and gets
    its best weights back.

    Args:
        module: ``module(n_features, n_outputs)`` returns a new member, a `torch.nn.Module` that
            turns rows into logits, one for each class (of several label columns, for each class of
            each column in turn); None for `TabularMLP`. Put a `Standardise` in front if the columns
            have scales of their own.
        n_members: Number of members.
        sampling: Which rows each member sees: ``"shared"``, ``"shuffled"``, ``"bootstrap"``,
            ``"folds"``, or one of `unisono.sampling`.
        hidden_layer_sizes: Of the default network.
        dropout: Of the default network.
        learning_rate: One number, or a list of one per member.
        weight_decay: Likewise.
        batch_size: Rows of a minibatch, at most.
        max_epochs: How often each member goes through its rows, at most.
        validation_fraction: Part of the rows to stop by, with the classes in the same shares. If
            that makes fewer than 10 rows, none is held out and all epochs are trained.
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
        ensemble_: The `unisono.Ensemble`, in eval mode; it returns logits.
        history_: The `unisono.History` of the last training.
        classes_: The labels, in the order of the probabilities; a list of arrays for several
            columns.
        n_features_in_: Number of columns of X.
        feature_names_in_: Their names, if X had any.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = EnsembleClassifier(n_members=4, max_epochs=20, random_state=0).fit(X, y)
        >>> model.predict_proba(X).shape
        (150, 3)
        >>> model.predict_uncertainty(X).epistemic.shape
        (150,)

    Reference: Lakshminarayanan, Pritzel and Blundell, "Simple and Scalable Predictive Uncertainty
    Estimation using Deep Ensembles", 2017, https://arxiv.org/abs/1612.01474
    """

    classes_: Any

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> EnsembleClassifier:
        """Train new members.

        Args:
            X: Finite numbers, an array or a DataFrame.
            y: Labels of any kind, one column or several.
            sample_weight: One number for each row, none negative: a row of weight 2 counts like
                two, one of weight 0 isn't there. None for equal ones.

        Returns:
            This estimator.

        Shape:
            - X: (B, F)
            - y: (B) or (B, columns)
            - sample_weight: (B)

        Raises:
            ValueError: If a parameter isn't possible, X isn't finite, or there is one class only.
        """
        settings = self._settings("fit")
        x, y, weights = self._checked("fit", X, y, sample_weight, reset=True)
        labels = labels_of(y)
        x, y, weights = with_weight(x, y, weights)
        codes = labels.encode("", y)
        self._check_several(labels, codes)
        self._begin()
        self._set_classes(labels)
        keys = codes if codes.ndim == 1 else np.unique(codes, axis=0, return_inverse=True)[1]
        self._fit_rows(
            settings, x, codes, weights, n_outputs=sum(labels.sizes), keys=keys.reshape(-1)
        )
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> EnsembleClassifier:
        """Go once through more rows; all members go on where they stand.

        The standardisation follows the rows that were seen. Nothing is held out. A weight is taken
        as it is: weights of 2 double the step that plain gradient descent would take.

        Args:
            X: As for `fit`.
            y: As for `fit`.
            classes: All labels that there will be, in the first call; a list of them for several
                columns. Later calls may leave it out.
            sample_weight: As for `fit`.

        Returns:
            This estimator.

        Shape:
            - as for `fit`

        Raises:
            ValueError: As for `fit`; and if a label is none of the classes.
        """
        call = self._call("partial_fit")
        settings = self._settings("partial_fit")
        is_first = not hasattr(self, "ensemble_")
        x, y, weights = self._checked("partial_fit", X, y, sample_weight, reset=is_first)
        if is_first:
            labels = check_classes(call, classes, y)
        else:
            labels = self._labels
            if classes is not None and not _same(labels, check_classes(call, classes, y)):
                raise ValueError(
                    f"{call}: classes are those of the first call; got {classes!r}, then"
                    f" {self.classes_!r}"
                )
        x, y, weights = with_weight(x, y, weights)
        codes = labels.encode(call, y)
        if is_first:
            self._set_classes(labels)
        self._fit_more(settings, x, codes, weights, n_outputs=sum(labels.sizes))
        return self

    def predict(self, X: Any) -> Array:
        """Return the label of the largest mean probability; of equals the first.

        Args:
            X: Rows with the columns of `fit`.

        Returns:
            Labels.

        Shape:
            - X: (B, F)
            - returns: (B) or (B, columns)
        """
        codes = self._predict_rows(X, lambda logits: [p.argmax(-1) for p in self._mean(logits)])
        return self._labels.decode(codes)

    def predict_proba(self, X: Any) -> Any:
        """Return the members' mean probabilities.

        Args:
            X: Rows with the columns of `fit`.

        Returns:
            Probabilities in the order of ``classes_``, of the network's dtype. A list of arrays for
            several label columns.

        Shape:
            - X: (B, F)
            - returns: (B, C)
        """
        return self._per_column(list(self._predict_rows(X, self._mean)))

    def predict_uncertainty(self, X: Any) -> Any:
        """Return probabilities and how much of the doubt is the members' disagreement.

        See `unisono.uncertainty.classification`.

        Args:
            X: Rows with the columns of `fit`.

        Returns:
            An `Uncertainty` of arrays: `prediction` as `predict_proba`, and `total`, `aleatoric`,
            `epistemic` in nats. A list of them for several label columns.

        Shape:
            - X: (B, F)
            - prediction: (B, C)
            - total, aleatoric, epistemic: (B)
        """

        def parts(logits: Tensor) -> list[Tensor]:
            return [each for own in self._labels.split(logits) for each in classification(own)]

        found = self._predict_rows(X, parts)
        each = [Uncertainty(*found[k : k + 4]) for k in range(0, len(found), 4)]
        return self._per_column(each)

    def predict_members(self, X: Any) -> Any:
        """Return the logits of every member.

        Args:
            X: Rows with the columns of `fit`.

        Returns:
            Logits in the order of ``classes_``. A list of arrays for several label columns.

        Shape:
            - X: (B, F)
            - returns: (N, B, C)
        """

        def parts(logits: Tensor) -> list[Tensor]:
            return [own.movedim(0, 1) for own in self._labels.split(logits)]

        found = self._predict_rows(X, parts)
        return self._per_column([np.moveaxis(own, 1, 0) for own in found])

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the share of rows that are predicted right, in all label columns.

        Args:
            X: Rows with the columns of `fit`.
            y: The true labels.
            sample_weight: One number for each row; None for equal ones.

        Returns:
            The accuracy, from 0 to 1.

        Shape:
            - X: (B, F)
            - y: (B) or (B, columns)
        """
        check_is_fitted(self, "ensemble_")
        if self._labels.is_single:
            return float(super().score(X, y, sample_weight))
        right = (self.predict(X) == np.asarray(y)).all(1)
        return float(np.average(right, weights=sample_weight))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        tags.target_tags.multi_output = True
        return tags

    def _task(self, *, weighted: bool) -> Task:
        sizes = self._labels.sizes
        return Task(class_loss(sizes, weighted=weighted), mean_probabilities(sizes))

    @property
    def _labels(self) -> Labels:
        if isinstance(self.classes_, list):
            return Labels(tuple(self.classes_), is_single=False)
        return Labels((self.classes_,), is_single=True)

    def _set_classes(self, labels: Labels) -> None:
        self.classes_ = labels.classes[0] if labels.is_single else list(labels.classes)

    def _per_column(self, found: list[Any]) -> Any:
        return found[0] if self._labels.is_single else found

    def _mean(self, logits: Tensor) -> list[Tensor]:
        return [combine.probabilities(own) for own in self._labels.split(logits)]

    def _checked(
        self, method: str, x: Any, y: Any, weights: Any, *, reset: bool
    ) -> tuple[Array, Array, Array | None]:
        x, y = self._check_xy(x, y, reset=reset, numeric=False)
        if hasattr(y, "toarray"):
            y = y.toarray()
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if y.dtype == object:
            labels_of(y)  # first, for its error if labels can't be put in order
        check_classification_targets(y)
        return x, y, check_weights(self._call(method), weights, len(x))

    def _check_several(self, labels: Labels, codes: Array) -> None:
        """Raise if a label column of the rows that count has one class only."""
        for k, own in enumerate(codes.reshape(len(codes), -1).T):
            found = np.unique(own)
            if len(found) < 2:
                where = "y" if labels.is_single else f"y[:, {k}]"
                label = labels.classes[k].tolist()[found[0]]
                raise ValueError(
                    f"{self._call('fit')}: there is one class only: all {len(own)} rows of positive"
                    f" weight have {where} = {label!r}; a classifier needs at least two"
                )


def _same(one: Labels, other: Labels) -> bool:
    pairs = zip(one.classes, other.classes, strict=False)
    return one.sizes == other.sizes and all(np.array_equal(a, b) for a, b in pairs)
