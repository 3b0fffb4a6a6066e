"""The estimators among those of scikit-learn: its own checks, and its tools around them."""

import pickle
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_wine
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from unisono.estimators import EnsembleClassifier, EnsembleRegressor

FAST = {"n_members": 2, "max_epochs": 25, "learning_rate": 1e-2, "hidden_layer_sizes": (32,)}


# All else is as by default. No check is expected to fail.
@parametrize_with_checks([EnsembleClassifier(**FAST), EnsembleRegressor(**FAST)])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("estimator", [EnsembleClassifier(), EnsembleRegressor()])
def test_the_defaults_make_checks_of_weights_and_of_training_pass(estimator):
    from sklearn.utils import estimator_checks as checks

    name, estimator = type(estimator).__name__, estimator.set_params(max_epochs=60, n_members=2)
    checks.check_sample_weight_equivalence_on_dense_data(name, estimator)
    checks.check_fit_idempotent(name, estimator)


def test_grid_search_over_members_and_learning_rates():
    X, y = load_wine(return_X_y=True)
    grid = {"n_members": np.array([1, 2]), "learning_rate": [1e-2, np.float64(1e-6)]}
    model = EnsembleClassifier(max_epochs=8, batch_size=32, random_state=0)
    search = GridSearchCV(model, grid, cv=2).fit(X, y)
    assert search.best_params_["learning_rate"] == 1e-2
    assert search.best_score_ > 0.9
    assert len(search.best_estimator_.ensemble_) == search.best_params_["n_members"]


@pytest.mark.slow
def test_cross_val_score_in_two_processes_equals_one():
    X, y = load_wine(return_X_y=True)
    model = EnsembleClassifier(max_epochs=3, n_members=2, batch_size=32, random_state=0)
    pipeline = make_pipeline(StandardScaler(), model)
    torch.testing.assert_close(
        cross_val_score(pipeline, X, y, cv=2, n_jobs=2), cross_val_score(pipeline, X, y, cv=2)
    )


@pytest.mark.parametrize("kind", [EnsembleClassifier, EnsembleRegressor])
def test_a_clone_has_the_parameters_and_is_not_fitted(kind):
    X, y = load_wine(return_X_y=True)
    model = kind(n_members=2, max_epochs=1, learning_rate=[0.1, 0.2], patience=None).fit(X, y)
    again = clone(model)
    assert again.get_params() == model.get_params()
    assert not hasattr(again, "ensemble_")


@pytest.mark.parametrize("kind", [EnsembleClassifier, EnsembleRegressor])
def test_a_pickle_predicts_the_same_and_trains_on_the_same(kind):
    X, y = load_wine(return_X_y=True)
    model = kind(n_members=2, random_state=0)
    options = {"classes": [0, 1, 2]} if kind is EnsembleClassifier else {}
    model.partial_fit(X, y, **options)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))
    model.partial_fit(X, y)
    again.partial_fit(X, y)
    for one, other in zip(again.predict_uncertainty(X), model.predict_uncertainty(X), strict=True):
        np.testing.assert_array_equal(one, other)


def test_columns_of_a_data_frame_are_known_by_name():
    X, y = load_diabetes(return_X_y=True, as_frame=True)
    model = EnsembleRegressor(n_members=2, max_epochs=2).fit(X, y)
    assert list(model.feature_names_in_) == list(X.columns)
    assert model.n_features_in_ == 10
    with pytest.raises(ValueError, match=r"Feature names seen at fit time, yet now missing:\n- s6"):
        model.predict(X.drop(columns="s6"))
    with pytest.raises(ValueError, match="Feature names must be in the same order"):
        model.predict(X[X.columns[::-1]])
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        model.predict(X.to_numpy())


def test_what_a_data_frame_of_whole_numbers_gives_is_what_its_array_gives():
    X = pd.DataFrame({"a": np.arange(40), "b": np.arange(40) % 3})
    y = X["b"] > 0
    options = {"n_members": 2, "max_epochs": 3, "random_state": 0}
    one = EnsembleClassifier(**options).fit(X, y)
    other = EnsembleClassifier(**options).fit(X.to_numpy(np.float64), y.to_numpy())
    np.testing.assert_array_equal(one.predict_proba(X), other.predict_proba(X.to_numpy()))
    assert one.predict(X).dtype == bool


def test_without_scikit_learn_the_error_names_the_extra():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import unisono\n"
        "try:\n    from unisono.estimators import EnsembleClassifier\n"
        "except unisono.MissingExtraError as error:\n    print(error)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == (
        "unisono.estimators needs the package sklearn, from the extra `sklearn`:"
        ' pip install "unisono[sklearn]"\n'
    )
