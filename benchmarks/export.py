"""Exported ensembles: how far from the loop they are, and how fast they answer.

Run from the root of the repository: ``python -m benchmarks.export``. Every contender is compared
with the loop over the members before it is timed, on all members and one minibatch for all of them,
without gradients; onnxruntime gets as many threads as torch.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import CAPTURE, LOOP, UNISONO, Contender
from benchmarks.measure import Times, time_in_turns
from benchmarks.models.small import LSTMClassifier, cnn, mlp, transformer
from unisono import Ensemble, export
from unisono.commands.machine import describe_machine

ONNX, PACKAGE, PROGRAM = "onnxruntime", ".pt2", "program"
COLUMNS = (LOOP, UNISONO, CAPTURE, PROGRAM, PACKAGE, ONNX)
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Case:
    """A network, how many of it, and a minibatch.

    Args:
        name: For the table.
        make: Makes a member.
        members: How many.
        shape: Of the minibatch.
        strategy: How the ensemble is exported.
    """

    name: str
    make: Callable[[], nn.Module]
    members: int
    shape: tuple[int, ...]
    strategy: Any = "auto"


CASES = (
    Case("10 x tutorial MLP, B 64", lambda: mlp(784, 128, 128, 10), 10, (64, 1, 28, 28)),
    Case("10 x tutorial MLP, B 1", lambda: mlp(784, 128, 128, 10), 10, (1, 1, 28, 28)),
    Case("100 x 8-32-32-1, B 16", lambda: mlp(8, 32, 32, 1), 100, (16, 8)),
    Case("8 x CNN 8-16, B 16", lambda: cnn(8, 16), 8, (16, 1, 28, 28)),
    Case("8 x CNN 32-64, B 32", lambda: cnn(32, 64), 8, (32, 1, 28, 28)),
    Case("8 x Transformer d 64, T 16, B 8", transformer, 8, (8, 16, 64)),
    Case("8 x LSTM 32-64-64, T 20, B 16, loop", LSTMClassifier, 8, (16, 20, 32), "loop"),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each contender, at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing, for each case")
    options = parser.parse_args()
    machine = describe_machine(torch.device("cpu"))
    version = importlib.metadata.version("onnxruntime")
    print(f"{machine['cpu']}, {torch.get_num_threads()} threads, Python {machine['python']}")
    print(f"torch {machine['torch']}, onnxruntime {version}; milliseconds, medians\n")
    print(f"| case | {' | '.join(COLUMNS)} | loop / onnxruntime | {UNISONO} / onnxruntime ", end="")
    print(f"| {UNISONO} / .pt2 | onnxruntime differs by |\n{'|---' * (len(COLUMNS) + 5)}|")
    exports = []
    for case in CASES:
        if options.only in case.name:
            found, told = measured(case, options.rounds, options.seconds)
            print(row(case, found, told[ONNX].difference), flush=True)
            exports.append((case, told))
    print("\n| case | ONNX file | exported in | .pt2 file | compiled in | ops |")
    print("|---|---|---|---|---|---|")
    for case, told in exports:
        print(files_row(case, told))


@dataclass(frozen=True)
class Told:
    """What an export took, and what it came to."""

    seconds: float
    num_bytes: int
    difference: float
    ops: str = ""


def measured(
    case: Case, rounds: int, seconds: float
) -> tuple[Mapping[str, Times], dict[str, Told]]:
    """Export, compare with the loop, and time in turns."""
    torch.manual_seed(0)
    models = [case.make().eval() for _ in range(case.members)]
    x = torch.randn(case.shape)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contenders, told = made(case, models, x, Path(folder))
        want = contenders[LOOP].outputs(contenders[LOOP].run())
        scale = max(1.0, float(want.abs().max()))
        for name, contender in contenders.items():
            difference = float((contender.outputs(contender.run()) - want).abs().max())
            assert difference <= TOLERANCE * scale, f"{case.name}: {name} differs by {difference}"
        return time_in_turns(contenders, rounds=rounds, seconds=seconds), told


def made(
    case: Case, models: list[nn.Module], x: Tensor, folder: Path
) -> tuple[dict[str, Contender], dict[str, Told]]:
    """The contenders, and what the exports took."""
    ens = Ensemble(copy.deepcopy(models)).eval()
    exported = Ensemble(copy.deepcopy(models), strategy=case.strategy).eval()
    for _ in range(2):
        ens(x)  # chooses how to run
    start = time.perf_counter()
    onnx = export.onnx(exported, x, folder / "ens.onnx")
    told = {ONNX: Told(_since(start), onnx.num_bytes, onnx.difference.absolute, _ops(onnx.ops))}
    start = time.perf_counter()
    package = export.package(exported, x, folder / "ens.pt2")
    told[PACKAGE] = Told(_since(start), package.num_bytes, package.difference.absolute)
    contenders = {
        LOOP: Contender(lambda: [model(x) for model in models], torch.stack),
        UNISONO: _without_gradients(lambda: ens(x)),
        CAPTURE: _without_gradients(_bound(ens.capture(x), x)),
        PROGRAM: _without_gradients(_bound(export.program(exported, x).module(), x)),
        PACKAGE: Contender(_bound(torch._inductor.aoti_load_package(str(package.path)), x)),
        ONNX: Contender(_in_onnxruntime(onnx, x), lambda found: torch.as_tensor(found[0])),
    }
    return contenders, told


def _in_onnxruntime(written: export.Export, x: Tensor) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        written.path, options, providers=["CPUExecutionProvider"]
    )
    feed = {written.inputs[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def _bound(fn: Callable[[Tensor], Any], x: Tensor) -> Callable[[], Any]:
    return lambda: fn(x)


def _without_gradients(run: Callable[[], Any]) -> Contender:
    return Contender(torch.no_grad()(run))


def _since(start: float) -> float:
    return time.perf_counter() - start


def _ops(ops: Mapping[str, int]) -> str:
    if len(ops) > 10:
        return f"{sum(ops.values())} ops"
    return ", ".join(f"{count} {op}" for op, count in sorted(ops.items()))


def row(case: Case, times: Mapping[str, Times], difference: float) -> str:
    """One line of the table: milliseconds, and ratios of medians."""
    medians = {name: times[name].median for name in COLUMNS}
    cells = [case.name, *(f"{1e3 * medians[name]:.3g}" for name in COLUMNS)]
    for over, under in ((LOOP, ONNX), (UNISONO, ONNX), (UNISONO, PACKAGE)):
        ratio = medians[over] / medians[under]
        cells.append(f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**")
    return "| " + " | ".join([*cells, f"{difference:.1e}"]) + " |"


def files_row(case: Case, told: Mapping[str, Told]) -> str:
    """One line of the table of files."""
    onnx, package = told[ONNX], told[PACKAGE]
    sizes = [f"{each.num_bytes / 1e6:.2f} MB | {each.seconds:.0f} s" for each in (onnx, package)]
    return f"| {case.name} | {' | '.join(sizes)} | {onnx.ops} |"


if __name__ == "__main__":
    main()
