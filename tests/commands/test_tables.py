"""The tables, as text."""

import io

import pytest
from rich.console import Console

from unisono.commands.metrics import Scores
from unisono.commands.tables import bench_table, format_seconds, score_table


def render(table):
    text = io.StringIO()
    Console(file=text, width=80).print(table)
    return [" ".join(line.replace("│", " ").split()) for line in text.getvalue().splitlines()]


def test_scores():
    accuracy = Scores((0.9, 0.8), 0.85, 0.95, 0.925)
    nll = Scores((0.3, 0.4), 0.35, 0.25, 0.5)
    lines = render(score_table("two models", accuracy, nll))
    assert lines[0] == "two models"
    for line in (
        "member 0 90.00 % 0.3000",
        "member 1 80.00 % 0.4000",
        "mean of the members 85.00 % 0.3500",
        "ensemble, mean probability 95.00 % 0.2500",
        "ensemble, vote 92.50 % 0.5000",
    ):
        assert line in lines


def test_times_and_ratios():
    option = {
        "seconds": {
            "without vmap": {"median": 4e-3, "iqr": 4e-4},
            "with vmap": {"median": 2e-3, "iqr": 2e-4},
            "with unisono": {"median": 5e-4, "iqr": 5e-5},
        },
        "ratios": {
            "without vmap / with vmap": {"of_medians": 2.0},
            "without vmap / with unisono": {"of_medians": 8.0},
            "with vmap / without vmap": {"of_medians": 0.5},
            "with vmap / with unisono": {"of_medians": 4.0},
        },
    }
    lines = render(bench_table("same minibatch", option))
    assert "without vmap 4 ms 400 µs 1.00 0.50" in lines
    assert "with vmap 2 ms 200 µs 2.00 1.00" in lines
    assert "with unisono 500 µs 50 µs 8.00 4.00" in lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.5 s"), (0.25, "250 ms"), (1.5e-3, "1.5 ms"), (1.23e-5, "12.3 µs")],
)
def test_units(seconds, text):
    assert format_seconds(seconds) == text
