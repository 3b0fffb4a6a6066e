"""The estimators against scikit-learn's bagged MLPs, on five data sets in the same folds.

Run from the root of the repository: ``python -m benchmarks.estimators``. Ours run as they are by
default. `BaggingClassifier(MLPClassifier)` and `BaggingRegressor(MLPRegressor)` run as they are by
default, too, with as many members, after a `StandardScaler`, with ``max_iter`` raised until all of
them converge. A second version of theirs has hidden layers of the sizes that ours have, a third
stops early, as ours do. All take turns on each fold; times are means over the folds.

``--data`` and ``--folds`` run a part of it; the results of parts add up in the file ``--json``.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import sklearn
import torch
from mlxtend.data import autompg_data
from sklearn import datasets
from sklearn.ensemble import BaggingClassifier, BaggingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import unisono
from unisono.estimators import EnsembleClassifier, EnsembleRegressor

FOLDS: Final = 5
MEMBERS: Final = 10
MAX_ITER: Final = 5000
OURS: Final = "unisono"
CONVERGED: Final = "bagged MLPs"
SAME_SIZE: Final = "bagged MLPs of the same size"
STOPPED: Final = "bagged MLPs, early stopping"
PREDICTED: Final = 20_000  # rows that are predicted for time: those of the fold, repeated

Array = np.ndarray[Any, np.dtype[Any]]


def auto_mpg() -> tuple[Array, Array]:
    """Without the column of names, which is empty."""
    X, y = autompg_data()
    return X[:, np.isfinite(X).all(0)], y


def load(name: str) -> tuple[Array, Array]:
    """Features and target of one of scikit-learn's data sets."""
    found: tuple[Array, Array] = getattr(datasets, f"load_{name}")(return_X_y=True)
    return found


CLASSES: Final = ("breast_cancer", "wine", "digits")
NUMBERS: Final = ("diabetes", "auto_mpg")


def contenders(name: str) -> Mapping[str, Callable[[int], Any]]:
    """Name -> estimator for the fold of this number."""
    if name in CLASSES:
        ours, bag, one = EnsembleClassifier, BaggingClassifier, MLPClassifier
    else:
        ours, bag, one = EnsembleRegressor, BaggingRegressor, MLPRegressor

    def bagged(fold: int, **options: Any) -> Any:
        mlp = one(max_iter=MAX_ITER, **options)
        return make_pipeline(StandardScaler(), bag(mlp, n_estimators=MEMBERS, random_state=fold))

    return {
        OURS: lambda fold: ours(n_members=MEMBERS, random_state=fold),
        CONVERGED: bagged,
        SAME_SIZE: lambda fold: bagged(fold, hidden_layer_sizes=ours().hidden_layer_sizes),
        STOPPED: lambda fold: bagged(fold, early_stopping=True),
    }


def run_fold(name: str, fold: int) -> dict[str, dict[str, float]]:
    """Score and time of each contender on one fold."""
    X, y = auto_mpg() if name == "auto_mpg" else load(name)
    kind = StratifiedKFold if name in CLASSES else KFold
    train, test = list(kind(FOLDS, shuffle=True, random_state=0).split(X, y))[fold]
    out = {}
    for contender, make in contenders(name).items():
        model = make(fold)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            model.fit(X[train], y[train])
        fit = time.perf_counter() - start
        many = np.resize(X[test], (PREDICTED, X.shape[1]))
        model.predict(many[:100])
        start = time.perf_counter()
        model.predict(many)
        predict = time.perf_counter() - start
        out[contender] = {
            "score": float(model.score(X[test], y[test])),
            "fit": fit,
            "predict": predict,
            **log_likelihoods(name, model, X[test], y[test]),
        }
    return out


def log_likelihoods(name: str, model: Any, X: Array, y: Array) -> dict[str, float]:
    """Mean log-likelihood of the test rows, in nats: of the ensemble, and of its mean member."""
    if isinstance(model, EnsembleRegressor):
        mean, variance = model.predict_members(X)
        each = -0.5 * (np.square(y - mean) / variance + np.log(2 * np.pi * variance))
    elif isinstance(model, EnsembleClassifier):
        place = np.searchsorted(model.classes_, y)
        logits = torch.from_numpy(model.predict_members(X)).double()
        each = logits.log_softmax(-1).numpy()[:, np.arange(len(y)), place]
    elif name in CLASSES:
        place = np.searchsorted(model.classes_, y)
        probabilities = model.predict_proba(X)[np.arange(len(y)), place]
        return {"ll": float(np.log(np.maximum(probabilities, 1e-15)).mean())}
    else:
        return {}  # point predictions have no likelihood
    ensemble = np.logaddexp.reduce(each, 0) - np.log(len(each))
    return {"ll": float(ensemble.mean()), "member ll": float(each.mean())}


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "cpu": model,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scikit-learn": sklearn.__version__,
        "unisono": unisono.__version__,
    }


def paired(folds: list[dict[str, dict[str, float]]], other: str, key: str) -> str:
    """Mean of ours minus theirs over the folds, and its standard error."""
    if any(key not in fold[name] for fold in folds for name in (OURS, other)):
        return "-"
    differences = np.array([fold[OURS][key] - fold[other][key] for fold in folds])
    error = differences.std(ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else np.nan
    return f"{differences.mean():+.3f} ± {error:.3f}"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as a Markdown table."""
    rows = [
        "| data | against | score | theirs | difference | log-likelihood | fit | predict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, by_fold in results.items():
        folds = [by_fold[key] for key in sorted(by_fold)]

        def mean(contender: str, key: str, folds: Any = folds) -> float:
            return float(np.mean([fold[contender].get(key, np.nan) for fold in folds]))

        for other in (CONVERGED, SAME_SIZE, STOPPED):
            ratios = [mean(other, key) / mean(OURS, key) for key in ("fit", "predict")]
            ll = mean(other, "ll")
            cells = [
                f"{name}, {'accuracy' if name in CLASSES else 'R²'}",
                other,
                f"{mean(OURS, 'score'):.3f}",
                f"{mean(other, 'score'):.3f}",
                paired(folds, other, "score"),
                "-" if np.isnan(ll) else f"{ll:.3f}",
                *(f"{ratio:.1f}×" for ratio in ratios),
            ]
            rows.append("| " + " | ".join(cells) + " |")
    rows += [
        "",
        "| data | log-likelihood of the mean member | of the ensemble | fit | predict |",
        "|---|---|---|---|---|",
    ]
    for name, by_fold in results.items():
        folds = [fold[OURS] for fold in by_fold.values()]
        member, whole, fit, predict = (
            float(np.mean([fold[key] for fold in folds]))
            for key in ("member ll", "ll", "fit", "predict")
        )
        own = f"| {name} | {member:.3f} | {whole:.3f} | {fit:.2f} s | {1000 * predict:.0f} ms |"
        rows.append(own)
    return "\n".join(rows)


def main() -> None:
    """Run what was asked for, add it to the file, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimators", description=__doc__)
    every = [*CLASSES, *NUMBERS]
    parser.add_argument("--data", nargs="*", default=every, choices=every)
    parser.add_argument("--folds", nargs="*", type=int, default=list(range(FOLDS)))
    parser.add_argument("--json", type=Path, default=Path("build/estimators.json"))
    options = parser.parse_args()
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    results = known.get("results", {})
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for name in options.data:
        for fold in options.folds:
            results.setdefault(name, {})[str(fold)] = run_fold(name, fold)
            facts = {"machine": machine(), "members": MEMBERS, "results": results}
            options.json.write_text(json.dumps(facts, indent=1) + "\n")
            print(name, fold, json.dumps(results[name][str(fold)]), flush=True)
    print(table({name: results[name] for name in every if name in results}))


if __name__ == "__main__":
    main()
