"""What it costs that gradients of N members arrive in one tensor, where networks are large.

Run from the root of the repository: ``python -m benchmarks.joining``. PyTorch computes the
gradient of a convolution into memory of its own, one member at a time if the members run one by
one. An ensemble has one ``.grad`` for all, so N gradients are copied once more; a plain loop
leaves them where they are. The table takes that step apart: the loop, the loop with a copy of its
gradients into memory that is there already (the least that joining can cost), the loop with a
copy into new memory, and the ensemble with ``strategy="loop"``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

from benchmarks.cases import CASES, Case, Scenario
from benchmarks.contenders import in_float64, loop, unisono
from benchmarks.measure import EXACT_TOLERANCE, assert_equal
from benchmarks.predict import describe_run


def main() -> None:
    """Print a row for each of the large networks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joining", description=__doc__)
    parser.add_argument("--only", default="U-Net", help="a part of the names of the cases")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    print(f"{describe_run(options)}\n", flush=True)
    print(
        "| forward and backward | gradients, MB | loop, ms | loop, copied | copied to new memory",
        end="",
    )
    print(" | unisono | how | loop, copied / loop |\n|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if options.only in case.name:
            print(row(case, options.rounds), flush=True)


def row(case: Case, rounds: int) -> str:
    """Time one case; the gradients of the ensemble are compared with the loop's first."""
    scenario = Scenario(case, shared=False, backward=True)
    models, minibatches = scenario.models(), scenario.minibatches()
    exact = [make(scenario, *in_float64(models, minibatches)) for make in (loop, unisono)]
    for contender in exact:
        contender.run()
    assert_equal(exact[1].gradients(), exact[0].gradients(), EXACT_TOLERANCE)
    del exact
    plain = loop(scenario, models, minibatches)
    ours = unisono(scenario, models, minibatches)
    plain.run()
    room = plain.gradients()
    size = sum(gradient.nbytes for gradient in room.values()) / 1e6

    def copied() -> None:
        plain.run()
        plain.gradients(out=room)  # the loop's own option

    def copied_to_new() -> None:
        plain.run()
        plain.gradients()

    times = _in_turns((plain.run, copied, copied_to_new, ours.run), rounds)
    told = " | ".join(f"{seconds * 1e3:.0f}" for seconds in times)
    return f"| {case.name} | {size:.0f} | {told} | {ours.note} | {times[1] / times[0]:.2f} |"


def _in_turns(calls: tuple[Callable[[], object], ...], rounds: int) -> list[float]:
    """Median seconds of each; A B C, A B C, ..."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, own in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            own.append(time.perf_counter() - started)
    return [median(own) for own in times]


if __name__ == "__main__":
    main()
