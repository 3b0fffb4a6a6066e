"""The benchmark measures what it names, and equality comes first."""

import pytest
import torch

from unisono.commands import bench
from unisono.commands.outcome import CommandError

NAMES = ["without vmap", "with vmap", "with unisono"]
SETTINGS = bench.BenchSettings(
    members=2, batch=4, hidden=8, device=torch.device("cpu"), threads=1, rounds=2
)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(bench, "_SECONDS_PER_TURN", 0.001)


def test_the_report_is_complete():
    rounds = []
    report = bench.run_bench(SETTINGS, on_round=lambda: rounds.append(None))
    assert len(rounds) == 2 * SETTINGS.rounds
    sizes = {name: report[name] for name in ("members", "batch", "hidden", "threads", "rounds")}
    assert sizes == {"members": 2, "batch": 4, "hidden": 8, "threads": 1, "rounds": 2}
    assert report["machine"]["cpu"]
    assert report["machine"]["torch"] == torch.__version__
    assert list(report["options"]) == ["different minibatch per model", "same minibatch"]
    for option in report["options"].values():
        assert list(option["seconds"]) == NAMES
        assert all(times["median"] > 0 <= times["iqr"] for times in option["seconds"].values())
        assert len(option["ratios"]) == 6
        there = option["ratios"]["without vmap / with unisono"]["of_medians"]
        back = option["ratios"]["with unisono / without vmap"]["of_medians"]
        assert there * back == pytest.approx(1)


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        bench.run_bench(SETTINGS, on_round=lambda: None)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_turns_are_taken_in_order(monkeypatch):
    calls = []

    class Timer:
        def __init__(self, stmt, globals, num_threads):
            self.stmt = stmt
            assert num_threads == SETTINGS.threads

        def timeit(self, number):
            calls.append(self.stmt)
            return torch.utils.benchmark.Measurement(1, [0.5], None)

    monkeypatch.setattr(bench, "Timer", Timer)
    monkeypatch.setattr(
        torch.utils.benchmark.Measurement, "mean", property(lambda self: self.raw_times[0])
    )
    seconds = bench.time_in_turns(
        {"a": "A", "b": "B"}, {}, rounds=2, threads=1, on_round=lambda: None
    )
    assert calls == ["A", "B", "A", "B", "A", "B"]  # one to choose the length, then two rounds
    assert seconds == {"a": [0.5, 0.5], "b": [0.5, 0.5]}


def test_a_contender_that_differs_is_not_timed(monkeypatch):
    def build_scene(settings):
        scene = original(settings)
        with torch.no_grad():
            scene["params"]["fc3.bias"][1] += 0.1
        return scene

    original = bench.build_scene
    monkeypatch.setattr(bench, "build_scene", build_scene)
    monkeypatch.setattr(bench, "time_in_turns", lambda *_, **__: pytest.fail("was timed"))
    with pytest.raises(CommandError, match=r"^vmap\(fmodel\).* differs from the loop: Tensor-like"):
        bench.run_bench(SETTINGS, on_round=lambda: None)


def test_ratios_of_medians_and_medians_of_ratios():
    report = bench.summarise({"a": [1.0, 2.0, 9.0], "b": [1.0, 1.0, 1.5]})
    assert report["seconds"]["a"] == {"median": 2.0, "iqr": 4.0}
    assert report["ratios"]["a / b"] == {"of_medians": 2.0, "median_of_rounds": 2.0}
    assert report["ratios"]["b / a"]["median_of_rounds"] == 0.5
