"""Files in and out: many checkpoints to one ensemble, a large ensemble, one member of it.

Run from the root of the repository: ``python -m benchmarks.storage``. It writes about 10 GB to a
temporary folder (``--size 4`` is the GB of the large ensemble; TMPDIR says where).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from benchmarks.models.small import mlp
from benchmarks.predict import describe_run
from unisono import Ensemble

MEMBERS = 40  # of the large ensemble
CHECKPOINTS = 1000


def make_tutorial() -> nn.Module:
    """The network of PyTorch's tutorial on ensembles."""
    return mlp(784, 128, 128, 10)


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.storage", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=float, default=4.0, help="GB of the large ensemble")
    parser.add_argument("--checkpoints", type=int, default=CHECKPOINTS)
    parser.add_argument("--peak", type=Path, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(_peak_of_gathering(options.peak))
        return
    print(describe_run(options))
    with tempfile.TemporaryDirectory() as folder:
        _many_checkpoints(Path(folder), options.checkpoints, options.rounds)
        _large_ensemble(Path(folder), options.size, options.rounds)


def _many_checkpoints(folder: Path, count: int, rounds: int) -> None:
    """`from_checkpoints` beside building as many modules, loading each, and stacking them."""
    print(
        f"\n| {count} checkpoints of 784-128-128-10 | from_checkpoints, s | build, load, stack, s |"
    )
    print("|---|---|---|", end="")
    print(" ratio | build and stack alone, s | ratio | peak beside the stacked, MB |")
    for suffix in ("pt", "safetensors"):
        paths = _write_checkpoints(folder, count, suffix)
        ours, theirs = Ensemble.from_checkpoints(make_tutorial, paths), _one_by_one(paths)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name
        stacked = sum(t.nbytes for t in ours.state_dict().values())
        del ours, theirs
        times = _in_turns(
            {
                "ours": lambda paths=paths: Ensemble.from_checkpoints(make_tutorial, paths),
                "loaded": lambda paths=paths: _one_by_one(paths),
                "built": lambda: Ensemble([make_tutorial() for _ in range(count)]),
            },
            rounds,
        )
        command = [sys.executable, "-m", "benchmarks.storage", "--peak", *map(str, paths)]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        ours_s, loaded, built = (times[name] for name in ("ours", "loaded", "built"))
        print(
            f"| .{suffix} | {ours_s:.3f} | {loaded:.3f} | {loaded / ours_s:.1f}x | {built:.3f}"
            f" | {built / ours_s:.1f}x | {(peak - stacked) / 1e6:.0f} |",
            flush=True,
        )


def _write_checkpoints(folder: Path, count: int, suffix: str) -> list[Path]:
    paths = [folder / f"{i}.{suffix}" for i in range(count)]
    for i, path in enumerate(paths):
        torch.manual_seed(i)
        state = make_tutorial().state_dict()
        torch.save(state, path) if suffix == "pt" else safetensors.torch.save_file(state, path)
    return paths


def _one_by_one(paths: Sequence[Path]) -> Ensemble:
    models = []
    for path in paths:
        model = make_tutorial()
        is_pickled = path.suffix == ".pt"
        state = torch.load(path) if is_pickled else safetensors.torch.load_file(path)
        model.load_state_dict(state)
        models.append(model)
    return Ensemble(models)


def _peak_of_gathering(paths: Sequence[Path]) -> int:
    """By how many bytes the resident memory of this process grows at most."""
    Ensemble.from_checkpoints(make_tutorial, paths[:2])  # what is imported on the way
    before = _resident("VmRSS")
    ensemble = Ensemble.from_checkpoints(make_tutorial, paths)
    assert len(ensemble) == len(paths)
    return _resident("VmHWM") - before


def _resident(line: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{line}:")[2].split()[0]) * 1024


def _large_ensemble(folder: Path, size: float, rounds: int) -> None:
    """Loading beside reading the bytes, and one member of all."""
    layers = max(1, round(size * 1e9 / MEMBERS / (1024 * 1025 * 4)))

    def make() -> nn.Module:
        with torch.device("meta"):
            return nn.Sequential(*[nn.Linear(1024, 1024) for _ in range(layers)])

    path = folder / "ensemble.safetensors"
    ens = Ensemble([make().to_empty(device="cpu") for _ in range(MEMBERS)])
    for parameter in ens.parameters():
        nn.init.normal_(parameter)
    started = time.perf_counter()
    ens.save(path)
    saving = time.perf_counter() - started
    loaded = Ensemble.load(path, make)
    for name, tensor in ens.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    state = folder / "ensemble.pt"
    torch.save(ens.state_dict(), state)
    del ens, loaded
    times = _in_turns(
        {
            "load": lambda: Ensemble.load(path, make),
            "read": path.read_bytes,
            "torch.load": lambda: torch.load(state),
            "one": lambda: Ensemble.load(path, make, members=[7]),
        },
        rounds,
    )
    nbytes = path.stat().st_size
    print(f"\n| {nbytes / 1e9:.2f} GB, {MEMBERS} members | s | beside reading the bytes |")
    print("|---|---|---|")
    for name, label in (
        ("load", "`Ensemble.load`, checksums verified"),
        ("read", "`path.read_bytes()`"),
        ("torch.load", "`torch.load` of the state dict, no checksums"),
        ("one", "`Ensemble.load(members=[7])`"),
    ):
        print(f"| {label} | {times[name]:.3f} | {times[name] / times['read']:.2f}x |")
    print(f"| `ens.save`, with fsync, once | {saving:.3f} | |")
    share = _bytes_from_disk(path, lambda: Ensemble.load(path, make, members=[7])) / nbytes
    print(f"\nOne of {MEMBERS} members reads {share:.4f} of the file, 1/{MEMBERS} is {1 / MEMBERS}")


def _bytes_from_disk(path: Path, call: Callable[[], object]) -> int:
    """What a call reads from the disk when nothing of the file is in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = _from_disk()
    call()
    return _from_disk() - before


def _from_disk() -> int:
    return int(Path("/proc/self/io").read_text().partition("read_bytes:")[2].split()[0])


def _in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each; A B C, A B C, ..."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            result = call()
            times[name].append(time.perf_counter() - started)
            del result
    return {name: float(np.median(seconds)) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
