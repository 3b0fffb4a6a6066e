"""The benchmark builds every case, compares before it times, and tells what it left out."""

import functools
import json
import math
import time
from argparse import Namespace

import pytest
import torch

from benchmarks import (
    contenders,
    convolutions,
    epoch_contenders,
    measure,
    pooling,
    predict,
    recurrent,
    table,
    train,
    train_contenders,
)
from benchmarks.cases import CASES, scenarios
from benchmarks.contenders import LOOP, UNISONO, VMAP, Contender
from benchmarks.measure import Times
from unisono import Ensemble

LARGE = ("224x224", "U-Net", "ResNet", "MobileNet")  # seconds each, even with two members
# Half of the scenarios: forward on own minibatches, training on one.
TINY = [
    scenario
    for scenario in scenarios(tiny=True)
    if scenario.shared == scenario.backward and not any(name in scenario.name for name in LARGE)
]
OPTIONS = Namespace(
    compile="none", jax=False, rounds=1, seconds=0.0, close_seconds=0.0, start_seconds=0.0
)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(measure, "TURN_SECONDS", 1e-9)
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)


def row(name, **seconds):
    return table.Row(name, {key: Times([value]) for key, value in seconds.items()})


# The others take the same ways as one of these and longer; `make test-slow` runs them.
LONG = ("1024-1024", "CNN 32-64", "GPT", "T 16, B 64")


def long_ones_are_slow(found):
    return [
        pytest.param(
            scenario,
            marks=[pytest.mark.slow] if any(part in scenario.name for part in LONG) else [],
            id=scenario.name,
        )
        for scenario in found
    ]


@pytest.mark.parametrize("scenario", long_ones_are_slow(TINY))
def test_unisono_and_the_loop_are_timed_in_every_case(scenario, monkeypatch):
    # One strategy: to measure all of them for every case belongs into the benchmark.
    monkeypatch.setattr(contenders, "Ensemble", lambda models: Ensemble(models, strategy="loop"))
    monkeypatch.setattr(
        predict, "makers", lambda *_, **__: {LOOP: contenders.loop, UNISONO: contenders.unisono}
    )
    times = predict.run(scenario, OPTIONS).times
    assert {name: found.reason for name, found in times.items()} == {LOOP: "", UNISONO: ""}
    assert {len(found.seconds) for found in times.values()} in ({1}, {2}, {3})  # more if close


def test_names_of_scenarios_are_unique():
    names = [scenario.name for scenario in scenarios()]
    assert len(set(names)) == len(names) == 4 * len(CASES)


def test_a_model_can_be_made_for_every_case():
    for case in CASES:
        args = case.inputs(2)
        assert len(args[0]) == 2
        with torch.device("meta"):
            assert sum(p.numel() for p in case.make().parameters()) > 0


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", [VMAP, contenders.HAND])
def test_other_contenders_equal_the_loop(name, shared, backward):
    (scenario,) = (
        s
        for s in scenarios(tiny=True)
        if s.case.sizes == (8, 32, 32, 1)
        and s.case.name.startswith("100 x")
        and (s.shared, s.backward) == (shared, backward)
    )
    models, minibatches = scenario.models(), scenario.minibatches()
    chosen = {
        key: predict.makers(scenario, compiled="none", with_jax=False)[key] for key in (LOOP, name)
    }
    ready, out = measure.prepare(
        {
            key: lambda make=make: make(scenario, models, minibatches)
            for key, make in chosen.items()
        },
        lambda key: chosen[key](scenario, *contenders.in_float64(models, minibatches)),
        seconds=0,
    )
    if name == contenders.HAND and backward:
        assert out[name].reason == "forward of an MLP only"
    else:
        assert set(ready) == {LOOP, name}


def prepare(other, exact):
    """A contender beside a loop that returns ones; both in float32 and in float64."""
    loop = Contender(lambda: torch.ones(2, 3))
    return measure.prepare(
        {LOOP: lambda: loop, "other": lambda: Contender(lambda: torch.full((2, 3), other))},
        lambda name: loop if name == LOOP else Contender(lambda: torch.full((2, 3), exact)),
        seconds=0,
    )


def test_a_contender_that_differs_is_not_timed():
    ready, out = prepare(1.01, 1.02)
    assert set(ready) == {LOOP}
    assert out["other"].reason.startswith("AssertionError: outputs differ by 2.0e-02")
    assert math.isnan(out["other"].median)


def test_a_contender_that_is_nan_is_not_timed():
    assert set(prepare(math.nan, 1.0)[0]) == {LOOP}


def test_a_contender_that_differs_by_rounding_is_timed():
    assert set(prepare(1.01, 1.0)[0]) == {LOOP, "other"}


def test_a_contender_that_takes_too_long_is_not_timed():
    with pytest.raises(TimeoutError, match="took more than"), measure.at_most(0.01):
        time.sleep(10)


def test_the_order_changes():
    calls = []
    contenders_ = {name: Contender(lambda name=name: calls.append(name)) for name in "abc"}
    measure.time_in_turns(contenders_, rounds=3, seconds=1e9)
    assert "".join(calls) == "aabbcc" + "abc" + "acb" + "cab"  # first, how many calls make a turn


@pytest.mark.parametrize(
    ("median", "rounds"), [(0.85, 1), (0.93, 3), (0.96, 6), (1.0, 6), (1.08, 3), (1.2, 1)]
)
def test_close_ones_have_more_rounds_that_all_count(median, rounds, monkeypatch):
    seconds = {LOOP: 1.0, VMAP: 2.0, UNISONO: median, contenders.CAPTURE: 0.5, contenders.JAX: 1}
    turns = []

    def time_in_turns(ready, **_):
        turns.append(list(ready))
        return {name: Times([seconds[name]] * len(turns)) for name in ready}

    monkeypatch.setattr(predict, "prepare", lambda *_, **__: (dict.fromkeys(seconds), {}))
    monkeypatch.setattr(predict, "time_in_turns", time_in_turns)
    monkeypatch.setattr(predict, "makers", lambda *_, **__: {})
    found = predict.run(TINY[0], OPTIONS).times
    assert {name: len(times.seconds) for name, times in found.items()} == {
        **dict.fromkeys((LOOP, VMAP, UNISONO, contenders.CAPTURE), rounds),
        contenders.JAX: 1,
    }
    close = [LOOP, VMAP, UNISONO, contenders.CAPTURE]
    assert turns == [list(seconds), close, close][: {1: 1, 3: 2, 6: 3}[rounds]]


def test_the_verdict_names_the_worst_case():
    rows = [row("A", loop=4.0, vmap=2.0, unisono=1.0), row("B", loop=1.0, vmap=3.0, unisono=2.0)]
    text = table.verdict(rows)
    assert "geometric mean of 2 cases: 1.00." in text
    assert "auto is at most 2.00 x the faster of loop and vmap in every case (worst: B)." in text
    assert "loses in 1 of 2 cases" in text


def test_a_dash_has_a_reason():
    times = {LOOP: Times([1.0]), UNISONO: Times([0.5]), VMAP: Times(reason="no rule for lstm")}
    text = table.details([table.Row("LSTM", times)])
    assert "- vmap: no rule for lstm (LSTM)" in text
    assert table.ratio_row(table.Row("LSTM", times)).startswith("| LSTM | 2.00 | - | 2.00 |")


def test_everything_is_written(tmp_path):
    rows = [row("A, forward, own minibatches", loop=4.0, vmap=2.0, unisono=1.0)]
    predict.write_json(tmp_path / "bench.json", rows, "a machine")
    cases = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert cases["A, forward, own minibatches"]["vmap"]["median"] == 2.0
    pytest.importorskip("matplotlib", reason="needs unisono[plots]")
    from benchmarks import chart

    chart.draw(rows, tmp_path / "bench.png", "a machine")
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_peak_memory_counts_what_is_alive_at_once():
    def run():
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second + 1

    assert 8000 <= measure.peak_memory(run) < 8100  # two of the three at any moment, and scalars


# Training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scenario",
    long_ones_are_slow(s for s in train.step_scenarios(tiny=True) if "1024" not in s.name),
)
def test_every_way_to_train_takes_the_steps_of_the_loop(scenario, monkeypatch):
    one = functools.partial(Ensemble, strategy="fused")
    monkeypatch.setattr(train_contenders, "Ensemble", one)
    make, exact = train._step(scenario)
    kinds = [name for name in train.STEPS if name != train_contenders.JAX]
    ready, out = measure.prepare({name: make(name) for name in kinds}, exact, seconds=0)
    assert {name: found.reason for name, found in out.items()} == {}
    assert list(ready) == kinds


@pytest.mark.parametrize("case", train.epoch_cases(tiny=True), ids=lambda case: case.name)
def test_every_way_to_train_an_epoch_gives_the_weights_of_the_loop(case, monkeypatch):
    one = functools.partial(Ensemble, strategy="fused")
    monkeypatch.setattr(epoch_contenders, "Ensemble", one)
    make, exact = train._epoch(case)
    kinds = [name for name in train.EPOCHS if name != epoch_contenders.JOBLIB]
    ready, out = measure.prepare({name: make(name) for name in kinds}, exact, seconds=0)
    assert {name: found.reason for name, found in out.items()} == {}
    assert list(ready) == kinds


def test_a_contender_that_takes_other_steps_is_not_timed():
    scenario = train.step_scenarios(tiny=True)[0]
    make, exact = train._step(scenario)
    makers = {name: make(name) for name in (train_contenders.LOOP, train_contenders.VMAP)}
    slower = functools.partial(torch.optim.Adam, weight_decay=0.5)

    def other():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim, "Adam", slower)
            return makers[train_contenders.VMAP]()

    def exact_other(name):
        with pytest.MonkeyPatch.context() as patch:
            if name == train_contenders.VMAP:
                patch.setattr(torch.optim, "Adam", slower)
            return exact(name)

    ready, out = measure.prepare(
        {train_contenders.LOOP: makers[train_contenders.LOOP], train_contenders.VMAP: other},
        exact_other,
        seconds=0,
    )
    assert list(ready) == [train_contenders.LOOP]
    assert "differ by" in out[train_contenders.VMAP].reason


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("layer", convolutions.LAYERS, ids=lambda layer: layer.name)
def test_convolutions_of_all_contenders_are_those_of_the_loop(layer, backward):
    small = layer._replace(channels=layer.channels // 8, filters=layer.filters // 8)
    found = convolutions.row(small, backward, rounds=1, seconds=0)
    *_, loop, vmap = found.strip(" |").split(" | ")
    assert float(loop) > 0
    assert float(vmap) > 0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kind", pooling.KINDS)
@pytest.mark.parametrize("pool", pooling.POOLS, ids=lambda pool: pool.name)
def test_pools_of_all_contenders_are_those_of_the_loop(pool, kind, backward):
    small = pool._replace(batch=2, channels=2)
    found = pooling.row(kind, small, backward, rounds=1, seconds=0)
    *_, loop, vmap = found.strip(" |").split(" | ")
    assert float(loop) > 0
    assert float(vmap) > 0


def test_a_pool_that_differs_is_not_timed(monkeypatch):
    make = pooling.contenders

    def broken(*args):
        found = make(*args)
        found[UNISONO].outputs = lambda outputs: outputs[0] + 1
        return found

    monkeypatch.setattr(pooling, "contenders", broken)
    with pytest.raises(AssertionError, match="outputs differ"):
        pooling.row("max", pooling.POOLS[0], False, rounds=1, seconds=0)


def test_a_convolution_that_differs_is_not_timed(monkeypatch):
    make = convolutions.contenders

    def broken(*args):
        found = make(*args)
        found[VMAP].outputs = lambda outputs: outputs[0] + 1
        return found

    monkeypatch.setattr(convolutions, "contenders", broken)
    with pytest.raises(AssertionError, match="outputs differ"):
        convolutions.row(convolutions.LAYERS[0], False, rounds=1, seconds=0)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kind", recurrent.KINDS)
def test_recurrent_layers_are_those_of_the_loop(kind, backward):
    found = recurrent.row(recurrent.scenario(kind, 4, 2, 3, 5, backward), rounds=1, seconds=0)
    assert found.startswith(f"| 4 x {kind} 3-5, T 20, B 2 | ")
    *_, loop, ours, ratio = found.strip(" |").split(" | ")
    assert float(loop) / float(ours) == pytest.approx(float(ratio), rel=0.05)


def test_recurrent_layers_that_differ_are_not_timed(monkeypatch):
    make = recurrent.contenders.unisono

    def broken(*args):
        found = make(*args)
        found.outputs = lambda outputs: outputs + 1
        return found

    monkeypatch.setattr(recurrent.contenders, "unisono", broken)
    with pytest.raises(AssertionError, match="outputs differ"):
        recurrent.row(recurrent.scenario("GRU", 4, 2, 3, 5, False), rounds=1, seconds=0)
