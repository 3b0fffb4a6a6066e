"""Ensembles as scikit-learn estimators: `EnsembleClassifier` and `EnsembleRegressor`.

Needs the extra ``sklearn``. ``import unisono`` doesn't import this package.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from unisono import extras as _extras

if TYPE_CHECKING:
    from unisono.estimators.classifier import EnsembleClassifier
    from unisono.estimators.networks import GaussianMLP, Standardise, TabularMLP
    from unisono.estimators.regressor import EnsembleRegressor
    from unisono.estimators.state import from_state, to_state

__all__ = [
    "EnsembleClassifier",
    "EnsembleRegressor",
    "GaussianMLP",
    "Standardise",
    "TabularMLP",
    "from_state",
    "to_state",
]

_HOMES = {
    "EnsembleClassifier": "classifier",
    "EnsembleRegressor": "regressor",
    "GaussianMLP": "networks",
    "Standardise": "networks",
    "TabularMLP": "networks",
    "from_state": "state",
    "to_state": "state",
}


# On first use (PEP 562): scikit-learn takes as long to import as torch, and `unisono predict` needs
# only the files of this package that do without it, `stored` and what is below.
def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _extras.require("sklearn", extra="sklearn", purpose=__name__)
    found = getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
