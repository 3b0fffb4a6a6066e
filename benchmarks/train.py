"""Time a step and an epoch of training: solo trainings, vmap, JAX, and unisono.

Run from the root of the repository: ``python -m benchmarks.train``, or as a part of ``make bench``.
A step is forward, backward and one update by Adam. Every contender starts from the same weights,
and before it is timed its parameters are compared with the loop's after three steps (or an epoch).
All take turns in every round, and the order rotates. A ratio is a quotient of medians.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from benchmarks import contenders as forward_contenders
from benchmarks import epoch_contenders, train_contenders
from benchmarks.cases import CASES, Scenario
from benchmarks.contenders import Contender
from benchmarks.epoch_contenders import EpochCase
from benchmarks.measure import Times, prepare, time_in_turns
from benchmarks.models.small import cnn, mlp
from benchmarks.predict import describe_run
from benchmarks.table import geometric_mean
from unisono.commands.machine import describe_machine

STEPS: Final[Mapping[str, Callable[..., Contender]]] = {
    train_contenders.LOOP: train_contenders.loop,
    train_contenders.VMAP: train_contenders.vmap,
    train_contenders.VMAP_FUSED: functools.partial(train_contenders.vmap, fused=True),
    train_contenders.JAX: train_contenders.jax,
    train_contenders.UNISONO: train_contenders.unisono,
    train_contenders.OWN_VALUES: functools.partial(train_contenders.unisono, own_values=True),
}
EPOCHS: Final[Mapping[str, Callable[..., Contender]]] = {
    epoch_contenders.LOOP: epoch_contenders.loop,
    epoch_contenders.JOBLIB: epoch_contenders.joblib,
    epoch_contenders.OWN_LOOP: epoch_contenders.own_loop,
    epoch_contenders.FIT: epoch_contenders.by_fit,
}
NAMES: Final = ("MLP", "x 8-32", "x 23-", "x 784-", "x 1024", "CNN", "Transformer")
EPOCH_CASES: Final = (
    EpochCase("10 x 784-128-128-10", functools.partial(mlp, 784, 128, 128, 10), 10, (784,)),
    EpochCase("64 x 784-32-10", functools.partial(mlp, 784, 32, 10), 64, (784,)),
    EpochCase("8 x CNN 8-16", functools.partial(cnn, 8, 16), 8, (1, 28, 28), 1000, 16),
)
Row = tuple[str, dict[str, Times]]


def main() -> None:
    """Time what the options ask for and print the report."""
    options = _parser().parse_args()
    caption = describe_run(options)
    print(f"{caption}\n", flush=True)
    steps = [s for s in step_scenarios(tiny=options.tiny) if options.only in s.name]
    rows = _report("step of Adam", STEPS, [(s.name, _step(s)) for s in steps], options)
    cases = {f"{c.name}, {c.rows} rows": c for c in epoch_cases(tiny=options.tiny)}
    named = [(name, _epoch(case)) for name, case in cases.items() if options.only in name]
    rows += _report("epoch, own order of the rows", EPOCHS, named, options)
    if options.json:
        options.json.write_text(json.dumps(_plain(rows, caption), indent=1) + "\n")


def step_scenarios(*, tiny: bool = False) -> list[Scenario]:
    """Own minibatches for each member, train mode."""
    chosen = [case for case in CASES if any(name in case.name for name in NAMES)]
    if tiny:
        chosen = [replace(case, members=2, batch=2) for case in chosen]
    return [Scenario(case, shared=False, backward=True) for case in chosen]


def epoch_cases(*, tiny: bool = False) -> list[EpochCase]:
    """What is trained for an epoch."""
    return [replace(c, members=2, rows=8, batch=4) if tiny else c for c in EPOCH_CASES]


Makers = tuple[
    Callable[[str], Callable[[], Contender]],
    Callable[[str], Contender],
]


def _step(scenario: Scenario) -> Makers:
    torch.manual_seed(0)
    models, minibatches = scenario.models(), scenario.minibatches()

    def make(name: str) -> Callable[[], Contender]:
        return functools.partial(STEPS[name], scenario, models, minibatches)

    def exact(name: str) -> Contender:
        return STEPS[name](scenario, *forward_contenders.in_float64(models, minibatches))

    return make, exact


def _epoch(case: EpochCase) -> Makers:
    torch.manual_seed(0)
    models: list[nn.Module] = [case.make().train() for _ in range(case.members)]
    x, y = case.data()

    def make(name: str) -> Callable[[], Contender]:
        return functools.partial(EPOCHS[name], case, models, (x, y))

    def exact(name: str) -> Contender:
        doubled = [copy.deepcopy(model).double() for model in models]
        return EPOCHS[name](case, doubled, (x.double(), y))

    return make, exact


def _report(
    what: str,
    kinds: Mapping[str, Callable[..., Contender]],
    cases: Sequence[tuple[str, Makers]],
    options: argparse.Namespace,
) -> list[Row]:
    """Time the cases one by one and print a line for each."""
    if not cases:
        return []
    print(f"| {what}, ms | {' | '.join(kinds)} | loop / unisono | jax / unisono |")
    print("|---" * (len(kinds) + 3) + "|", flush=True)
    rows: list[Row] = []
    for name, (make, exact) in cases:
        ready, out = prepare(
            {kind: make(kind) for kind in kinds}, exact, seconds=options.start_seconds
        )
        times = time_in_turns(ready, rounds=options.rounds, seconds=options.seconds)
        rows.append((name, {**out, **times}))
        print(_line(rows[-1], list(kinds)), flush=True)
    print(f"\n{_verdict(rows, list(kinds))}\n", flush=True)
    return rows


def _line(row: Row, kinds: Sequence[str]) -> str:
    name, times = row
    cells = [f"{1e3 * times[k].median:.3g}" if times[k].seconds else "-" for k in kinds]
    ratios = [_ratio(times, "loop"), _ratio(times, "jax")]
    cells += ["-" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios]
    return f"| {name} | {' | '.join(cells)} |"


def _ratio(times: Mapping[str, Times], over: str) -> float:
    """Of another contender's median to that of the last plain unisono of the row."""
    under = "unisono" if "unisono" in times else epoch_contenders.FIT
    return times[over].median / times[under].median if over in times else math.nan


def _verdict(rows: Sequence[Row], kinds: Sequence[str]) -> str:
    """The mean gain, the losses, and what was not timed."""
    gains = {name: _ratio(times, "loop") for name, times in rows}
    mean = geometric_mean(list(gains.values()))
    lines = [f"unisono is {mean:.2f} times as fast as the loop (geometric mean of {len(rows)})."]
    losses = {name: gain for name, gain in gains.items() if gain < 1}
    lines += [f"- slower than the loop: {1 / gain:.2f} x, {name}" for name, gain in losses.items()]
    for name, times in rows:
        if train_contenders.OWN_VALUES in times and times[train_contenders.OWN_VALUES].seconds:
            ratio = times[train_contenders.OWN_VALUES].median / times["unisono"].median
            lines.append(f"- own values cost {ratio:.2f} x of equal ones: {name}")
        lines += [f"- not timed: {k}, {name}: {times[k].reason}" for k in kinds if times[k].reason]
    return "\n".join(lines)


def _plain(rows: Sequence[Row], caption: str) -> dict[str, Any]:
    return {
        "run": caption,
        "machine": describe_machine(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "cases": {
            name: {kind: found.summary() for kind, found in times.items()} for name, times in rows
        },
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--rounds", type=int, default=40, help="at most so many; at least 9")
    parser.add_argument("--seconds", type=float, default=6, help="for the rounds of one case")
    parser.add_argument("--start-seconds", type=float, default=120, help="to compile or to plan")
    parser.add_argument("--tiny", action="store_true", help="two members, minibatches of two")
    parser.add_argument("--json", type=Path, help="write all times")
    return parser


if __name__ == "__main__":
    main()
