"""Time the loop, torch.vmap, unisono and others on networks of many kinds, wins and losses alike.

Run from the root of the repository: ``python -m benchmarks.predict``, or ``make bench``. Before a
contender is timed its outputs are compared with the loop's, and its gradients where they are
timed; one that can't run a case is a dash, with the reason below the table. All contenders take
turns in every round, in changing order. A ratio is a quotient of medians. Where unisono is within a
tenth of the faster of the loop and vmap, these and `capture` go on for 20 seconds, and for 40 more
where it is a twentieth; all rounds count.

The threads are torch's; JAX has a pool of its own, as large as the machine has cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import chart, contenders, table
from benchmarks.cases import Scenario, scenarios
from benchmarks.contenders import Contender
from benchmarks.jax_mlp import jax_mlp
from benchmarks.measure import peak_memory, prepare, time_in_turns
from unisono.commands.machine import describe_machine

RATIO = (contenders.LOOP, contenders.VMAP, contenders.UNISONO, contenders.CAPTURE)
# How near to 1 a speed-up is told more exactly, in how many times ``--close-seconds``: the first
# rounds tell it to some percent, which is not enough there.
CLOSE = ((0.1, 1), (0.05, 2))
MANY = 1000  # rounds; as many as there is time for


def main() -> None:
    """Run the scenarios that were asked for and print the report."""
    options = _parser().parse_args()
    chosen = [s for s in scenarios(tiny=options.tiny) if options.only in s.name]
    caption = describe_run(options)
    print(f"{caption}\n", flush=True)
    if options.memory:
        report_memory(chosen)
        return
    rows: list[table.Row] = []
    print("\n".join(table.HEADER), flush=True)
    for scenario in chosen:
        rows.append(run(scenario, options))
        print(table.ratio_row(rows[-1]), flush=True)
    print(f"\n{table.verdict(rows)}\n\n{table.details(rows)}")
    if options.json:
        write_json(options.json, rows, caption)
    if options.png:
        chart.draw(rows, options.png, caption)


def run(scenario: Scenario, options: argparse.Namespace) -> table.Row:
    """Check and time all contenders of one scenario."""
    torch.manual_seed(0)
    models, minibatches = scenario.models(), scenario.minibatches()
    chosen = makers(scenario, compiled=options.compile, with_jax=options.jax)
    ready, out = prepare(
        {
            name: functools.partial(make, scenario, models, minibatches)
            for name, make in chosen.items()
        },
        lambda name: chosen[name](scenario, *contenders.in_float64(models, minibatches)),
        seconds=options.start_seconds,
    )
    times = time_in_turns(ready, rounds=options.rounds, seconds=options.seconds)
    row = table.Row(scenario.name, {**out, **times})
    of_the_ratio = {name: ready[name] for name in RATIO if name in ready}
    for near, factor in CLOSE:
        if abs(row.speed_up - 1) <= near:
            seconds = factor * options.close_seconds
            for name, more in time_in_turns(of_the_ratio, rounds=MANY, seconds=seconds).items():
                times[name].seconds += more.seconds
    if options.compile != "none":
        torch.compiler.reset()
    return row


def makers(
    scenario: Scenario, *, compiled: str, with_jax: bool
) -> dict[str, Callable[..., Contender]]:
    """The contenders of one scenario, the loop first.

    Args:
        scenario: What is to run.
        compiled: ``"none"``, ``"small"`` (the MLPs) or ``"all"``: where torch.compile takes part.
        with_jax: Whether JAX takes part.
    """
    found: dict[str, Callable[..., Contender]] = {
        contenders.LOOP: contenders.loop,
        contenders.VMAP: contenders.vmap,
        contenders.UNISONO: contenders.unisono,
        contenders.CAPTURE: contenders.capture,
        contenders.TENSORDICT: contenders.tensordict,
        contenders.HAND: contenders.hand_written,
    }
    if compiled == "all" or (compiled == "small" and scenario.case.sizes):
        found[contenders.LOOP_COMPILED] = functools.partial(contenders.loop, compiled=True)
        found[contenders.VMAP_COMPILED] = functools.partial(contenders.vmap, compiled=True)
    if with_jax:
        found[contenders.JAX] = jax_mlp
    return found


def report_memory(chosen: list[Scenario]) -> None:
    """Print the peak of newly allocated memory of a forward, for vmap and for unisono."""
    print("| case | vmap, MiB | unisono, MiB | unisono / vmap | strategy |")
    print("|---|---|---|---|---|")
    worst = (0.0, "")
    for scenario in chosen:
        if scenario.backward:
            continue
        torch.manual_seed(0)
        models, minibatches = scenario.models(), scenario.minibatches()
        ours = contenders.unisono(scenario, models, minibatches)
        mine = peak_memory(ours.run)
        try:
            theirs = peak_memory(contenders.vmap(scenario, models, minibatches).run)
        except Exception as error:
            print(f"| {scenario.name} | {type(error).__name__} | {mine / 2**20:.2f} | - | - |")
            continue
        worst = max(worst, (mine / theirs, scenario.name))
        sizes = f"{theirs / 2**20:.2f} | {mine / 2**20:.2f} | {mine / theirs:.2f}"
        print(f"| {scenario.name} | {sizes} | {ours.note} |", flush=True)
    print(f"\nunisono takes at most {worst[0]:.2f} x the memory of vmap (worst: {worst[1]}).")


def write_json(file: Path, rows: list[table.Row], caption: str) -> None:
    """Write every time of every contender."""
    found: dict[str, Any] = {
        "run": caption,
        "machine": describe_machine(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "cases": {
            row.name: {name: times.summary() for name, times in row.times.items()} for row in rows
        },
    }
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def describe_run(options: argparse.Namespace) -> str:
    """One line without which the numbers mean little."""
    machine = describe_machine(torch.device("cpu"))
    return (
        f"{machine['cpu']}, {torch.get_num_threads()} threads, Python {machine['python']},"
        f" torch {machine['torch']}, at most {options.rounds} interleaved rounds,"
        f" load {os.getloadavg()[0]:.1f} at the start"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    parser.add_argument("--rounds", type=int, default=40, help="at most so many; at least 9")
    parser.add_argument("--seconds", type=float, default=12, help="for the rounds of one case")
    parser.add_argument(
        "--close-seconds",
        type=float,
        default=20,
        help="for more rounds of the loop, vmap and unisono where they are close",
    )
    parser.add_argument("--start-seconds", type=float, default=180, help="to compile or to plan")
    parser.add_argument(
        "--compile",
        choices=("none", "small", "all"),
        default="small",
        help="where torch.compile takes part: nowhere, on the MLPs, everywhere (hours)",
    )
    parser.add_argument("--no-compile", dest="compile", action="store_const", const="none")
    parser.add_argument("--no-jax", dest="jax", action="store_false")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--tiny", action="store_true", help="two members, minibatches of two")
    parser.add_argument("--json", type=Path, help="write all times")
    parser.add_argument("--png", type=Path, help="write a chart")
    return parser


if __name__ == "__main__":
    main()
