"""Ensembles as scikit-learn estimators: `EnsembleClassifier` and `EnsembleRegressor`.

Needs the extra ``sklearn``. ``import unisono`` doesn't import this package.
"""

from unisono import extras as _extras

_extras.require("sklearn", extra="sklearn", purpose="unisono.estimators")

# After that, so that a missing scikit-learn is one clear error.
from unisono.estimators.classifier import EnsembleClassifier  # noqa: E402
from unisono.estimators.networks import GaussianMLP, Standardise, TabularMLP  # noqa: E402
from unisono.estimators.regressor import EnsembleRegressor  # noqa: E402
from unisono.estimators.state import from_state, to_state  # noqa: E402

__all__ = [
    "EnsembleClassifier",
    "EnsembleRegressor",
    "GaussianMLP",
    "Standardise",
    "TabularMLP",
    "from_state",
    "to_state",
]
