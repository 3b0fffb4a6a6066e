"""Choosing the fastest of several within a bounded number of runs; clocks are made up."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.engine.planning.contest import BUDGET, contest


class Runs:
    """Contestants that take given times, run after run; the last one repeats."""

    def __init__(self, times: dict[str, list[float]]) -> None:
        self.first = {name: each[0] for name, each in times.items()}
        self.left = {
            name: itertools.chain(each[1:], itertools.repeat(each[-1]))
            for name, each in times.items()
        }
        self.taken = [(name, each[0]) for name, each in times.items()]

    def run(self, name: str) -> float:
        time = next(self.left[name])
        self.taken.append((name, time))
        return time


def test_the_fastest_is_first_and_every_contestant_has_a_time() -> None:
    runs = Runs({"loop": [30.0], "vmap": [2.0], "fused": [1.0]})
    assert list(contest(runs.first, runs.run).items()) == [
        ("fused", 1.0),
        ("vmap", 2.0),
        ("loop", 30.0),
    ]


def test_what_is_paid_once_does_not_count() -> None:
    runs = Runs({"loop": [2.0], "fused": [7.0, 1.0]})
    assert next(iter(contest(runs.first, runs.run))) == "fused"


def test_a_disturbed_run_does_not_count() -> None:
    runs = Runs({"loop": [2.0], "fused": [1.0, 9.0, 1.0]})
    assert contest(runs.first, runs.run)["fused"] == 1.0


def test_slow_contestants_run_once() -> None:
    runs = Runs({"loop": [30.0], "vmap": [1.1], "fused": [1.0]})
    contest(runs.first, runs.run)
    assert [name for name, _ in runs.taken].count("loop") == 1


def test_alone_it_wins_after_one_more_run() -> None:
    runs = Runs({"fused": [3.0, 2.0]})
    assert contest(runs.first, runs.run) == {"fused": 2.0}
    assert len(runs.taken) == 2


def test_with_a_handicap_a_contestant_goes_on_only_if_it_wins_by_it() -> None:
    times = {"fused": [1.0], "loop": [1.05], "chunks": [0.95]}
    runs = Runs(times)
    contest(runs.first, runs.run, {"chunks": 1.1})
    assert [name for name, _ in runs.taken].count("chunks") == 1
    runs = Runs(times | {"chunks": [0.8]})
    assert next(iter(contest(runs.first, runs.run, {"chunks": 1.1}))) == "chunks"
    assert [name for name, _ in runs.taken].count("chunks") > 3


def test_close_contestants_run_on_until_they_are_told_apart() -> None:
    runs = Runs({"loop": [50.0], "fused": [1.05], "vmap": [1.0]})
    contest(runs.first, runs.run)
    counts = [[name for name, _ in runs.taken].count(each) for each in ("fused", "vmap")]
    assert counts == [13, 13]


def test_a_small_budget_is_spent_on_the_best() -> None:
    times = {"a": [1.0], "b": [1.01], "c": [1.02], "d": [1.03], "e": [1.04], "f": [1.05]}
    runs = Runs(times)
    contest(runs.first, runs.run)
    counts = {each: [name for name, _ in runs.taken].count(each) for each in times}
    assert counts == {"a": 3, "b": 3, "c": 2, "d": 1, "e": 1, "f": 1}


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.floats(0.01, 100.0), min_size=1))
def test_the_budget_holds(times: dict[str, float]) -> None:
    runs = Runs({name: [time] for name, time in times.items()})
    contest(runs.first, runs.run)
    spent = sum(time for _, time in runs.taken)
    assert spent <= BUDGET * max(times.values()) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_the_winner_does_not_depend_on_the_order(name: str) -> None:
    times = {other: [2.0] for other in "abc"} | {name: [1.0]}
    runs = Runs(times)
    assert next(iter(contest(runs.first, runs.run))) == name
