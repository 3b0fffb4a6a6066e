"""Training by `unisono.fit`: two processes of one thread each against one process of two threads.

Run from the root of the repository: ``python -m benchmarks.two_processes``, on two quiet cores.
Both ways train the same members on the same data. Before anything is timed, their weights after two
epochs in float64 are compared; in float32 Adam magnifies rounding. In each round the two take
turns, each in new processes. What is timed is one call of `fit`, on the slower rank, with all that
ranks tell each other in it; the start of the processes, the joining of the ranks, and a first
epoch, in which the way of each call is chosen, are not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

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


def main() -> None:
    """Compare, time, print a table; or be one of the processes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_processes", description=__doc__)
    parser.add_argument("--only", default="", choices=["", *CASES])
    parser.add_argument("--rounds", type=int, default=5)
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
        found = {way: run(way, name, 1, Path(folder), "float64") for way in WAYS}
        weights = [torch.load(own["weights"]) for own in found.values()]
        torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=TOLERANCE)
        for k in range(rounds):
            for way in WAYS[:: 1 if k % 2 else -1]:
                times[way].append(run(way, name, epochs, Path(folder))["seconds"])
    return times


def run(way: str, name: str, epochs: int, folder: Path, dtype: str = "float32") -> dict[str, Any]:
    """Start the processes, and give what they found; ``seconds`` is that of the slowest."""
    ranks = 2 if way == TWO else 1
    own = folder / way[0]
    own.mkdir(exist_ok=True)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [sys.executable, *(start if ranks > 1 else ["-m"]), "benchmarks.two_processes"]
    options = ["--epochs", str(epochs), "--worker", name, dtype, str(own)]
    threads = {"OMP_NUM_THREADS": str(len(WAYS) // ranks)}
    done = subprocess.run([*command, *options], env={**os.environ, **threads}, text=True, stderr=-1)
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-4000:]}")
    found = [json.loads((own / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {"seconds": max(each["seconds"] for each in found), "weights": own / "weights"}


def train(name: str, dtype: torch.dtype, epochs: int, folder: Path) -> None:
    """Be one of the processes: train, and write what it took, and the weights."""
    case = CASES[name]
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
    if mesh is not None:
        dist.barrier()
    seconds = go_on(epochs)
    rank = int(os.environ.get("RANK", "0"))
    (folder / f"{rank}.json").write_text(json.dumps({"seconds": seconds}))
    if rank == 0:
        weights: dict[str, Tensor] = dict(ens.state_dict())
        torch.save(weights, folder / "weights")
    if mesh is not None:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
