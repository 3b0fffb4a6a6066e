"""A run as one HTML file that needs no network: its settings, scores, plots and doubts."""

from unisono.report.page import render
from unisono.report.run import Run
from unisono.report.writing import read_run, write_report

__all__ = ["Run", "read_run", "render", "write_report"]
