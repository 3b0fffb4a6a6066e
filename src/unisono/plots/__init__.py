"""Plots of arrays and tensors on Matplotlib's axes; nothing is shown or saved.

Each function takes ``ax=`` and returns the axes. Without ``ax`` it makes a figure of its own, which
pyplot knows nothing of: ``plots.to_png(axes)`` writes it, ``axes.figure`` is it.
"""

from unisono.plots.agreement import correlation_heat_map, disagreement_heat_map
from unisono.plots.ensemble_size import SubsetScores, score_by_size, subset_scores
from unisono.plots.figure import to_png
from unisono.plots.histogram import uncertainty_histogram
from unisono.plots.regression import predicted_against_true, regression_band
from unisono.plots.reliability import reliability_diagram
from unisono.plots.speed import speed_bars
from unisono.plots.training import learning_curves, sweep

__all__ = [
    "SubsetScores",
    "correlation_heat_map",
    "disagreement_heat_map",
    "learning_curves",
    "predicted_against_true",
    "regression_band",
    "reliability_diagram",
    "score_by_size",
    "speed_bars",
    "subset_scores",
    "sweep",
    "to_png",
    "uncertainty_histogram",
]
