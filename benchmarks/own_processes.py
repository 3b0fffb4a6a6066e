"""Steps of large networks, each contender in a process of its own.

Run from the root of the repository: ``python -m benchmarks.own_processes``. `benchmarks.predict`
lets contenders take turns within one process. Where tensors are larger than what the C library
keeps for itself (32 MB), they then live on memory that another one has just freed, and a time says
as much about the neighbours as about the contender. Here processes take turns. In each the first
steps, in which memory is got and unisono chooses how to run, are not timed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

import torch

from benchmarks.cases import CASES, Scenario
from benchmarks.contenders import LOOP, UNISONO, VMAP, Contender, in_float64, loop, unisono, vmap
from benchmarks.measure import EXACT_TOLERANCE, assert_equal
from benchmarks.predict import describe_run

MAKERS = {LOOP: loop, VMAP: vmap, UNISONO: unisono}
WARM, TIMED = 4, 8  # steps


def main() -> None:
    """Print a row for each case; or be one of the processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own_processes", description=__doc__)
    parser.add_argument("--only", default="U-Net", help="a part of the names of the cases")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=MAKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    found = [Scenario(case, shared=s, backward=True) for case in CASES for s in (False, True)]
    chosen = [scenario for scenario in found if options.only in scenario.name]
    if options.worker:
        print(*seconds(make(options.worker, chosen[0])))
        return
    print(f"{describe_run(options)}\n", flush=True)
    print("| case | loop, ms | vmap | unisono | loop / unisono | vmap / unisono |")
    print("|---|---|---|---|---|---|")
    for scenario in chosen:
        compare(scenario)
        print(row(scenario.name, in_turns(scenario.name, options.rounds)), flush=True)


def make(name: str, scenario: Scenario) -> Contender:
    """A contender with models of its own, the same in each process."""
    torch.manual_seed(0)
    return MAKERS[name](scenario, scenario.models(), scenario.minibatches())


def compare(scenario: Scenario) -> None:
    """Raise unless all contenders give the gradients of the loop."""
    models, minibatches = scenario.models(), scenario.minibatches()
    gradients = []
    for maker in MAKERS.values():
        contender = maker(scenario, *in_float64(models, minibatches))
        contender.run()
        gradients.append(contender.gradients())
    for other in gradients[1:]:
        assert_equal(other, gradients[0], EXACT_TOLERANCE)


def seconds(contender: Contender) -> list[float]:
    """Of each step after the first ones."""
    found = []
    for _ in range(WARM + TIMED):
        started = time.perf_counter()
        contender.run()
        found.append(time.perf_counter() - started)
    return found[WARM:]


def in_turns(case: str, rounds: int) -> dict[str, list[float]]:
    """Contender -> the median step of each of its processes; A B C, A B C, ..."""
    times: dict[str, list[float]] = {name: [] for name in MAKERS}
    for _ in range(rounds):
        for name, own in times.items():
            command = [sys.executable, "-m", "benchmarks.own_processes", "--only", case]
            done = subprocess.run([*command, "--worker", name], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name}: {done.stderr[-4000:]}")
            own.append(median(map(float, done.stdout.split())))
    return times


def row(case: str, times: dict[str, list[float]]) -> str:
    """Medians over the processes, and ratios."""
    own = {name: median(found) for name, found in times.items()}
    told = " | ".join(f"{1e3 * found:.0f}" for found in own.values())
    ratios = " | ".join(f"{own[name] / own[UNISONO]:.2f}" for name in (LOOP, VMAP))
    return f"| {case} | {told} | {ratios} |"


if __name__ == "__main__":
    main()
