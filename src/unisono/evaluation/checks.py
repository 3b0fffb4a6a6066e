"""What `evaluate` needs to be true before it starts: all problems in one message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchmetrics import Metric

from unisono.ensemble import Ensemble
from unisono.evaluation.measures import READERS, built_in_names


def check_evaluate(
    ens: Any, *, task: Any, metrics: Any, functions: Mapping[str, Any], weights: Any
) -> None:
    """Raise unless an evaluation with these arguments can start; see `evaluate` for them."""
    if not isinstance(ens, Ensemble):
        raise TypeError(f"evaluate: the first argument is an Ensemble; got {type(ens).__name__}")
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"evaluate: metrics has a name for each metric; got {type(metrics).__name__}. Write "
            f'metrics={{"f1": MulticlassF1Score(3)}}'
        )
    problems = [
        f"{name} is a function of what the ensemble returns; got {found!r}"
        for name, found in functions.items()
        if found is not None and not callable(found)
    ]
    if task not in tuple(READERS):
        known = " or ".join(f'"{name}"' for name in READERS)
        problems.append(f"task is {known}; got {task!r}")
    else:
        problems += [
            f"metrics[{name!r}] has the name of a metric that is there anyway; give it another"
            for name in metrics
            if name in built_in_names(task)
        ]
    if weights is not None and functions.get("combine") is not None:
        problems.append(
            "weights belong to the default combination, and combine is another; leave one out"
        )
    if problems:
        raise ValueError("evaluate: " + "; ".join(problems))


def made(metrics: Mapping[str, Metric | Callable[[], Metric]]) -> dict[str, Metric]:
    """The caller's metrics, factories among them called.

    Raises:
        TypeError: If one is anything else.
    """
    found: dict[str, Any] = {
        name: metric() if not isinstance(metric, Metric) and _is_factory(metric) else metric
        for name, metric in metrics.items()
    }
    wrong = [
        f"metrics[{name!r}] is a metric of torchmetrics or a function that makes one; got "
        f"{type(metric).__name__}"
        for name, metric in found.items()
        if not isinstance(metric, Metric)
    ]
    if wrong:
        raise TypeError("evaluate: " + "; ".join(wrong))
    return found


def _is_factory(metric: Any) -> bool:
    # A MetricCollection can be called, too, but not without arguments.
    return isinstance(metric, type) or (callable(metric) and not hasattr(metric, "update"))
