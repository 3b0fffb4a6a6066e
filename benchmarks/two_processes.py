"""Training by `unisono.fit`: two processes of one thread each against one process of two threads.

Run from the root of the repository: ``python -m benchmarks.two_processes``, on two quiet cores.
Both ways train the same members on the same data. Before anything is timed, their weights after two
epochs in float64 are compared; in float32 Adam magnifies rounding. All processes are there from the
first round to the last, and the two ways take turns: who doesn't train sleeps. What is timed is one
call of `fit`, on the slower rank, with all that ranks tell each other in it; the start of the
processes, the joining of the ranks, and a first epoch, in which the way of each call is chosen, are
not.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from benchmarks.epoch_contenders import EpochCase
from benchmarks.models.small import mlp
from benchmarks.predict import describe_run
from unisono import Ensemble, distributed, fit, optim

ONE, TWO = "1 process, 2 threads", "2 processes, 1 thread each"
WAYS: Final = (ONE, TWO)
CASES: Final[Mapping[str, EpochCase]] = {
    "tutorial": EpochCase(
        "10 x 784-128-128-10, B 64", lambda: mlp(784, 128, 128, 10), 10, (784,), 3200, 64
    ),
    "tiny": EpochCase("1000 x 8-32-32-10, B 16", lambda: mlp(8, 32, 32, 10), 1000, (8,), 320, 16),
}
EPOCHS: Final = {"tutorial": 10, "tiny": 20}
TOLERANCE: Final = 1e-9  # in float64, of weights around 0.1
PAUSE: Final = 0.01  # seconds between two looks whether it is our turn


def main() -> None:
    """Compare, time, print a table; or be one of the processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_processes", description=__doc__)
    parser.add_argument("--only", default="", choices=["", *CASES])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, help="10 or 20 if it isn't given")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)  # case, dtype, folder
    options = parser.parse_args()
    if options.worker:
        case, dtype, folder = options.worker
        train(case, getattr(torch, dtype), options.epochs, Path(folder))
        return
    print(f"{describe_run(options)}\n", flush=True)
    print("| networks | one process, s | two processes, s | two / one | rounds |")
    print("|---|---|---|---|---|")
    for name, case in CASES.items():
        if options.only not in ("", name):
            continue
        times = measured(name, options.epochs or EPOCHS[name], options.rounds)
        one, two = (median(times[way]) for way in WAYS)
        each = ", ".join(f"{b / a:.2f}" for a, b in zip(times[ONE], times[TWO], strict=True))
        print(f"| {case.name} | {one:.2f} | {two:.2f} | {two / one:.2f} | {each} |", flush=True)


def measured(name: str, epochs: int, rounds: int) -> dict[str, list[float]]:
    """Way -> seconds of each round; the ways take turns."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for way in WAYS:
            with Trainer(way, name, 1, Path(folder), "float64") as exact:
                exact.turn()
            found.append(torch.load(exact.folder / "weights"))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=TOLERANCE)
        with ExitStack() as stack:
            trainers = {
                way: stack.enter_context(Trainer(way, name, epochs, Path(folder))) for way in WAYS
            }
            for k in range(rounds):
                for way in WAYS[:: 1 if k % 2 else -1]:
                    times[way].append(trainers[way].turn())
    return times


class Trainer:
    """The processes of one way, which wait for their turns.

    Args:
        way: How many there are.
        name: The case.
        epochs: Of a turn.
        folder: Where they write.
        dtype: Of weights and data.
    """

    def __init__(
        self, way: str, name: str, epochs: int, folder: Path, dtype: str = "float32"
    ) -> None:
        self.ranks = 2 if way == TWO else 1
        self.folder = folder / f"{self.ranks} {dtype}"
        self.folder.mkdir()
        self._turns = 0
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        command = [sys.executable, *(start if self.ranks > 1 else []), "-m"]
        options = ["--epochs", str(epochs), "--worker", name, dtype, str(self.folder)]
        threads = {"OMP_NUM_THREADS": str(len(WAYS) // self.ranks)}
        self._errors = (self.folder / "errors").open("w+")
        self._process = subprocess.Popen(
            [*command, "benchmarks.two_processes", *options],
            env={**os.environ, **threads},
            stderr=self._errors,
        )

    def __enter__(self) -> Trainer:
        self._wait_for("ready")
        return self

    def __exit__(self, *_: object) -> None:
        (self.folder / "end").touch()
        self._process.wait()
        self._errors.close()

    def turn(self) -> float:
        """Train; the seconds of the slowest rank."""
        (self.folder / f"turn {self._turns}").touch()
        self._wait_for(f"done {self._turns}")
        done = [self.folder / f"done {self._turns} {rank}" for rank in range(self.ranks)]
        self._turns += 1
        return max(json.loads(file.read_text()) for file in done)

    def _wait_for(self, what: str) -> None:
        files = [self.folder / f"{what} {rank}" for rank in range(self.ranks)]
        while not all(file.exists() for file in files):
            if self._process.poll() is not None:
                self._errors.seek(0)
                raise RuntimeError(f"{what}: {self._errors.read()[-4000:]}")
            time.sleep(PAUSE)


def train(name: str, dtype: torch.dtype, epochs: int, folder: Path) -> None:
    """Be one of the processes: train when it is our turn, and write what it took."""
    case = CASES[name]
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(0)
    x, y = case.data()
    mesh = distributed.make_mesh() if "RANK" in os.environ else None
    ens = Ensemble.build(case.make, case.members).to(dtype)
    optimizer = optim.Adam(ens, lr=1e-3)

    def go_on(epochs: int) -> float:
        start = time.perf_counter()
        fit(
            ens,
            (x.to(dtype), y),
            loss=F.cross_entropy,
            optimizer=optimizer,
            epochs=epochs,
            batch_size=case.batch,
            sampling="shuffled",
            progress=False,
            mesh=mesh,
        )
        return time.perf_counter() - start

    go_on(1)
    (folder / f"ready {rank}").touch()
    for k in itertools.count():
        while not (is_over := (folder / "end").exists()):
            if (folder / f"turn {k}").exists():
                break
            time.sleep(PAUSE)
        if is_over:
            break
        if mesh is not None:
            dist.barrier()
        seconds = go_on(epochs)
        if rank == 0:
            weights: dict[str, Tensor] = dict(ens.state_dict())
            torch.save(weights, folder / "weights")
        new = folder / f"new {rank}"
        new.write_text(json.dumps(seconds))
        new.rename(folder / f"done {k} {rank}")
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
