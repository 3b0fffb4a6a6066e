"""From one rank to 1024: what a step takes and a rank holds, simulated from one rank's step times.

Run from the root of the repository: ``python -m benchmarks.scaling``. It measures training steps
(forward, backward, Adam, one thread) for some numbers of members on this machine, and prints what
the formulas of `benchmarks.scaling_model` make of them. No thousand ranks have run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.models.small import mlp
from benchmarks.predict import describe_run
from benchmarks.scaling_model import (
    Link,
    Network,
    memory_bytes,
    shown_bytes,
    shown_seconds,
    step_seconds,
    sum_seconds,
)
from unisono import Ensemble, member_losses, optim

CLASSES: Final = 10
MEMBERS: Final = (10, 100, 1000, 10_000, 100_000, 1_000_000)
RANKS: Final = (1, 4, 16, 64, 256, 1024)
LINKS: Final[Mapping[str, Link]] = {
    "10 Gbit/s, 50 us": Link(1.25e9, 50e-6),
    "400 Gbit/s, 10 us": Link(50e9, 10e-6),
}


@dataclass(frozen=True)
class Case:
    """A network that is measured.

    Args:
        name: As it is shown.
        sizes: Of its layers.
        rows: Of a minibatch.
        counts: Numbers of members that are measured.
    """

    name: str
    sizes: tuple[int, ...]
    rows: int
    counts: tuple[int, ...]

    def make(self) -> nn.Module:
        """A member."""
        return mlp(*self.sizes)

    @property
    def network(self) -> Network:
        """What the formulas need of it; linear layers keep their input, ReLU its output."""
        parameters = sum(p.numel() for p in self.make().parameters())
        return Network(parameters, sum(self.sizes[1:]), self.sizes[0], self.rows, steps=1000)


CASES: Final = (
    Case("784-128-128-10, B 64", (784, 128, 128, CLASSES), 64, (1, 3, 10, 30, 100)),
    Case("8-32-32-10, B 16", (8, 32, 32, CLASSES), 16, (1, 10, 100, 1000, 10_000)),
)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_run(options))
    for case in CASES:
        measured = measure(case, case.counts, options.rounds)
        print(f"\n## {case.name}, {case.network.parameters:,} parameters\n")
        print("Measured, one rank of one thread:\n")
        print("| members | step |\n|---|---|")
        for count, seconds in measured.items():
            print(f"| {count:,} | {shown_seconds(seconds)} |")
        name, link = next(iter(LINKS.items()))  # with a faster one the table is the same
        print(f"\nSimulated, data=1, links of {name}: a step, and a rank's memory\n")
        print(table(case, measured, link))
        print("\nSimulated, what two replicas of a block add to a step:\n")
        print(replica_table(case))


def step_of(case: Case, members: int) -> Callable[[], None]:
    """A training step of so many members, with a minibatch that all see."""
    torch.manual_seed(0)
    ens = Ensemble.build(case.make, members, strategy="fused")
    optimizer = optim.Adam(ens, lr=1e-3)
    x, y = torch.randn(case.rows, case.sizes[0]), torch.randint(CLASSES, (case.rows,))

    def step() -> None:
        member_losses(F.cross_entropy, ens(x), y).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(case: Case, counts: Sequence[int], rounds: int) -> dict[int, float]:
    """Number of members -> median seconds of a step; the numbers take turns."""
    steps = {count: step_of(case, count) for count in counts}
    times: dict[int, list[float]] = {count: [] for count in counts}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for count, step in steps.items():
            turns = max(1, 100 // count)
            start = time.perf_counter()
            for _ in range(turns):
                step()
            times[count].append((time.perf_counter() - start) / turns)
    return {count: median(own) for count, own in times.items()}


def table(case: Case, measured: Mapping[int, float], link: Link) -> str:
    """Members by ranks; where there are fewer members than ranks, the others would be idle."""
    network = case.network
    lines = ["| N | " + " | ".join(f"{ranks:,} rank{'s' * (ranks > 1)}" for ranks in RANKS) + " |"]
    lines.append("|---" * (len(RANKS) + 1) + "|")
    for n in MEMBERS:
        cells = [
            f"{shown_seconds(step_seconds(n, ranks, network, measured, link))},"
            f" {shown_bytes(memory_bytes(n, ranks, network))}"
            if ranks <= n
            else "-"
            for ranks in RANKS
        ]
        lines.append(f"| {n:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def replica_table(case: Case) -> str:
    """Members of a block -> the time of the sum of their gradients over two replicas."""
    lines = ["| members of a block | " + " | ".join(LINKS) + " |", "|---" * (len(LINKS) + 1) + "|"]
    for members in (1, 10, 100, 1000):
        size = 4 * case.network.parameters * members
        cells = [shown_seconds(sum_seconds(size, 2, link)) for link in LINKS.values()]
        lines.append(f"| {members:,} ({shown_bytes(size)}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
