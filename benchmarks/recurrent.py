"""N recurrent layers of one size: the loop and unisono, where torch.vmap has no way to run them.

Run from the root of the repository: ``python -m benchmarks.recurrent``, on quiet cores. Own
minibatches, one layer. Outputs and gradients are compared with the loop's before anything is timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import Final

import torch
from torch import Tensor, nn

from benchmarks import contenders
from benchmarks.cases import Case, Scenario
from benchmarks.contenders import LOOP, UNISONO
from benchmarks.measure import TOLERANCE, assert_equal, results, time_in_turns
from benchmarks.predict import describe_run

KINDS: Final = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
# Members, minibatch, features, hidden features.
SIZES: Final = (
    (2, 1, 8, 32),
    (4, 1, 8, 32),
    (4, 16, 32, 64),
    (8, 1, 32, 64),
    (8, 16, 32, 64),
    (8, 4, 32, 256),
    (8, 32, 32, 256),
    (32, 16, 8, 32),
    (100, 1, 8, 32),
    (100, 64, 8, 16),
)
STEPS: Final = 20


class Recurrent(nn.Module):
    """One layer that tells its outputs at all steps."""

    def __init__(self, kind: str, inputs: int, hidden: int) -> None:
        super().__init__()
        self.layer = KINDS[kind](inputs, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) to (B, T, hidden)."""
        found: Tensor = self.layer(x)[0]
        return found


def main() -> None:
    """Compare, time, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recurrent", description=__doc__)
    parser.add_argument("--only", default="", help="a part of the names of the rows")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=4, help="for the rounds of one row")
    options = parser.parse_args()
    print(f"{describe_run(options)}\n", flush=True)
    print("| layers | | loop, ms | unisono | loop / unisono |")
    print("|---|---|---|---|---|")
    for kind, size, backward in itertools.product(KINDS, SIZES, (False, True)):
        chosen = scenario(kind, *size, backward)
        if options.only in chosen.case.name:
            print(row(chosen, options.rounds, options.seconds), flush=True)


def scenario(
    kind: str, members: int, batch: int, inputs: int, hidden: int, backward: bool
) -> Scenario:
    """One row of the table."""
    name = f"{members} x {kind} {inputs}-{hidden}, T {STEPS}, B {batch}"
    make = functools.partial(Recurrent, kind, inputs, hidden)
    case = Case(name, make, members, batch, functools.partial(_minibatch, inputs=inputs))
    return Scenario(case, shared=False, backward=backward)


def row(scenario: Scenario, rounds: int, seconds: float) -> str:
    """A line of the table."""
    torch.manual_seed(0)
    models, minibatches = scenario.models(), scenario.minibatches()
    makers = {LOOP: contenders.loop, UNISONO: contenders.unisono}
    ready = {name: make(scenario, models, minibatches) for name, make in makers.items()}
    wanted = results(ready[LOOP])
    for contender in ready.values():
        assert_equal(results(contender), wanted, TOLERANCE)
    times = time_in_turns(ready, rounds=rounds, seconds=seconds)
    loop, ours = (1e3 * times[name].median for name in (LOOP, UNISONO))
    what = "training" if scenario.backward else "forward"
    return f"| {scenario.case.name} | {what} | {loop:.3g} | {ours:.3g} | {loop / ours:.2f} |"


def _minibatch(batch: int, *, inputs: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, STEPS, inputs),)


if __name__ == "__main__":
    main()
