"""Time ``unisono predict`` on a large Parquet file, against a loop and scikit-learn's bagged MLPs.

Run from the root of the repository: ``python -m benchmarks.predict_table``. It makes a file of
two million rows, six columns of numbers and four of categories with values missing in two of them,
trains ten members briefly on the first rows, and predicts the file in a new process for each
contender and round, start and imports included:

- *unisono*: ``unisono predict``;
- *loop*: the same command, with a loop over the ten members as ordinary modules inside;
- *scikit-learn*: a `Pipeline` of a `ColumnTransformer` and a `BaggingClassifier` of as many
  `MLPClassifier`s with the same layers, which predicts the probabilities of the whole file at once,
  as its users write it; no uncertainty;
- *scikit-learn, streamed*: the same networks inside of our command, with its reading, its
  preprocessing in float32, its threads and its batches.

The networks of scikit-learn are trained before, and read with joblib. Every contender predicts a
file of one row too: what that takes is start and imports, and what the large file takes beyond it
is the work on its rows. First all rows of the loop's file are compared with those of unisono.
Memory is the largest resident set of the process, as the kernel counts it (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console

from unisono.commands import predict as command
from unisono.commands import run_folder, run_model, table_estimator
from unisono.commands.features import encode
from unisono.commands.machine import describe_machine
from unisono.commands.table_files import open_rows
from unisono.estimators.predicting import rows_at_once
from unisono.estimators.stored import StoredMembers
from unisono.uncertainty import Uncertainty, classification

UNISONO, LOOP = "unisono", "loop"
SKLEARN, STREAMED = "scikit-learn", "scikit-learn, streamed"
CONTENDERS = (UNISONO, LOOP, SKLEARN, STREAMED)
TRAINING_ROWS = 20_000
BATCH_OF_THE_FILE = 250_000


def main() -> None:
    """Make the file, train, compare, time, report."""
    options = _parser().parse_args()
    if options.child:
        child(options)
        return
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    make_table(folder / "rows.parquet", options.rows)
    train(folder, options.members)
    train_sklearn(folder)
    found = measure(folder, options.rounds)
    print(report(found, options))
    if options.json:
        summary = {
            "machine": describe_machine(torch.device("cpu")),
            "rows": options.rows,
            "members": options.members,
            "contenders": found,
        }
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


def make_table(path: Path, rows: int) -> None:
    """Write a table with a noisy rule in it, and its first rows as a file of their own."""
    random = np.random.default_rng(0)
    names = np.array(["red", "green", "blue", "cyan", "black", "white", "grey", "pink"])
    writer = None
    for start in range(0, rows, BATCH_OF_THE_FILE):
        n = min(BATCH_OF_THE_FILE, rows - start)
        numbers = random.normal(size=(6, n)) * [[1], [10], [100], [1], [1], [5]]
        codes = random.integers(0, len(names), (4, n))
        hidden = numbers[0] + numbers[1] / 10 * (codes[0] > 3) + (codes[1] == codes[2])
        numbers[3][random.random(n) < 0.05] = np.nan
        columns: dict[str, Any] = {f"x{k}": numbers[k] for k in range(6)}
        columns |= {f"c{k}": pa.array(names[codes[k]]) for k in range(4)}
        columns["c3"] = pa.array(names[codes[3]], mask=random.random(n) < 0.05)
        columns["y"] = np.where(hidden + random.normal(size=n) > 0, "yes", "no")
        table = pa.table(columns)
        if writer is None:
            pq.write_table(table.slice(0, TRAINING_ROWS), path.with_name("training.parquet"))
            pq.write_table(table.slice(0, 1), path.with_name("one.parquet"))
            writer = pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def train(folder: Path, members: int) -> None:
    """Train a run on the first rows, with the command."""
    arguments = ["train", "--data", str(folder / "training.parquet"), "--target", "y"]
    arguments += ["--task", "classification", "--members", str(members), "--epochs", "2"]
    arguments += ["--batch-size", "256", "--out", str(folder / "run")]
    subprocess.run([sys.executable, "-m", "unisono.cli", *arguments], check=True)


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Run every contender in a process of its own, in turns, and compare what they wrote."""
    names = ("seconds", "start_seconds", "cpu_seconds", "peak_mb")
    found: dict[str, Any] = {contender: {name: [] for name in names} for contender in CONTENDERS}
    for turn in range(rounds):
        for name in [*CONTENDERS][turn % 4 :] + [*CONTENDERS][: turn % 4]:
            start = run_process(arguments(name, folder, "one"))
            own = run_process(arguments(name, folder, "rows"))
            for what, value in (own | {"start_seconds": start["seconds"]}).items():
                found[name][what].append(value)
            print(f"round {turn + 1}, {name}: {own['seconds']:.1f} s", flush=True)
        if turn == 0:
            files = output(UNISONO, folder, "rows"), output(LOOP, folder, "rows")
            # In a process of its own: Linux counts the memory of this one as that of every process
            # that it starts from then on.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                print(pool.submit(compare, *files).result())
    return found


def output(name: str, folder: Path, rows: str) -> Path:
    """What a contender writes."""
    return folder / f"{name} of {rows}.parquet"


def arguments(name: str, folder: Path, rows: str) -> list[str]:
    """The command line of a contender for ``rows.parquet`` or ``one.parquet``."""
    ends = [str(folder / f"{rows}.parquet"), "--output", str(output(name, folder, rows))]
    if name == UNISONO:
        return [
            sys.executable,
            "-m",
            "unisono.cli",
            "predict",
            str(folder / "run"),
            "--input",
            *ends,
        ]
    own = ["--folder", str(folder), "--child", name, "--input", *ends]
    return [sys.executable, "-m", "benchmarks.predict_table", *own]


def run_process(arguments: list[str]) -> dict[str, float]:
    """Seconds, seconds of all its threads, and megabytes of one process."""
    started = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": usage.ru_maxrss / 1e3,  # kilobytes on Linux
    }


def compare(ours: Path, loops: Path) -> str:
    """Raise unless two files of results hold the same numbers."""
    one, other = pq.read_table(ours), pq.read_table(loops)
    assert one.schema == other.schema
    for name in one.column_names:
        if pa.types.is_floating(one.schema.field(name).type):
            pair = (torch.from_numpy(table[name].to_numpy()) for table in (one, other))
            torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5)  # computed in float32
    differ = int((one["prediction"].to_numpy() != other["prediction"].to_numpy()).sum())
    assert differ <= len(one) / 1e5, f"{differ} predictions differ"  # probabilities of 0.5
    return f"all {len(one):,} rows of unisono equal the loop's"


def child(options: argparse.Namespace) -> None:
    """Be one of the contenders, in this process."""
    folder: Path = options.folder
    if options.child == SKLEARN:
        predict_whole_file(folder, options.input, options.output)
        return
    used: list[Any] = []

    def load_members(*arguments: Any) -> Any:
        used.append(load_loop(*arguments) if options.child == LOOP else BaggedMLPs(folder))
        return used[-1]

    assert hasattr(run_model, "load_members"), "the command loads its members elsewhere"
    run_model.load_members = load_members
    request = command.PredictRequest(
        folder / "run", str(options.input), str(options.output), device="cpu"
    )
    command.run_predict(request, Console(stderr=True, quiet=True))
    assert used, "the command has predicted with members of its own"


def bagged_mlps(folder: Path) -> Any:
    """As many networks as the run has, with the same layers."""
    from sklearn.ensemble import BaggingClassifier
    from sklearn.neural_network import MLPClassifier

    from unisono.estimators import EnsembleClassifier

    members = run_folder.RunFolder(folder / "run").metrics()["members"]
    network = MLPClassifier(EnsembleClassifier().hidden_layer_sizes, max_iter=2, random_state=0)
    return BaggingClassifier(network, n_estimators=members, random_state=0)


def train_sklearn(folder: Path) -> None:
    """What its users write: one pipeline; and the networks alone, on our features."""
    import joblib
    import pandas as pd
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    numbers = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    texts = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    parts = [
        ("numbers", numbers, [f"x{k}" for k in range(6)]),
        ("texts", texts, [f"c{k}" for k in range(4)]),
    ]
    pipeline = make_pipeline(ColumnTransformer(parts), bagged_mlps(folder))
    frame = pd.read_parquet(folder / "training.parquet").iloc[:2000]  # as fast, however trained
    run = run_folder.RunFolder(folder / "run")
    columns = run.description.columns
    with open_rows(str(folder / "training.parquet"), columns, ()) as rows:
        values, _ = encode(next(rows.batches).slice(0, 2000), columns)
    features = run.preprocessing().transform(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it hasn't converged
        joblib.dump(pipeline.fit(frame.drop(columns="y"), frame["y"]), folder / "pipeline.joblib")
        joblib.dump(bagged_mlps(folder).fit(features, frame["y"]), folder / "bagged.joblib")


def predict_whole_file(folder: Path, source: Path, target: Path) -> None:
    """What a user of scikit-learn writes."""
    import joblib
    import pandas as pd

    pipeline = joblib.load(folder / "pipeline.joblib")
    rows = pd.read_parquet(source, columns=pipeline.feature_names_in_.tolist())
    shares = pipeline.predict_proba(rows)
    names = [f"probability_{label}" for label in pipeline.classes_]
    found = pd.DataFrame(shares, columns=names)
    found.insert(0, "prediction", pipeline.classes_[shares.argmax(1)])
    found.to_parquet(target)


def load_loop(*arguments: Any) -> Loop:
    """The members of a run as ordinary modules."""
    return Loop(table_estimator.load_members(*arguments))


class Loop:
    """A loop over the members instead of the ensemble."""

    def __init__(self, stored: StoredMembers) -> None:
        self.members = stored.ensemble.unstack()
        self.rows = rows_at_once(stored.ensemble, stored.n_features)

    def predict_uncertainty(self, features: np.ndarray[Any, Any]) -> Uncertainty:
        """As the estimator's, in chunks of as many rows."""
        parts = []
        with torch.inference_mode():
            for rows in torch.from_numpy(features).split(self.rows):
                outputs = torch.stack([member(rows) for member in self.members])
                parts.append(classification(outputs))
        return Uncertainty(*(torch.cat(own).numpy() for own in zip(*parts, strict=True)))


class BaggedMLPs:
    """scikit-learn's own in the place of an estimator of unisono."""

    def __init__(self, folder: Path) -> None:
        import joblib

        self.bagged = joblib.load(folder / "bagged.joblib")

    def predict_uncertainty(self, features: np.ndarray[Any, Any]) -> Uncertainty:
        """Mean probabilities; there is nothing to fill the rest with."""
        shares = self.bagged.predict_proba(features)
        nothing = np.zeros(len(features), shares.dtype)
        return Uncertainty(shares, nothing, nothing, nothing)


def report(found: dict[str, Any], options: argparse.Namespace) -> str:
    """The table for people."""
    machine = describe_machine(torch.device("cpu"))
    median = {
        name: {what: statistics.median(values) for what, values in own.items()}
        for name, own in found.items()
    }
    on_rows = {name: own["seconds"] - own["start_seconds"] for name, own in median.items()}
    lines = [
        "",
        (
            f"{options.rows:,} rows, {options.members} members, median of {options.rounds}, "
            f"{machine['cpu']}, {torch.get_num_threads()} threads, torch {machine['torch']}"
        ),
        "",
        "| | seconds | / unisono | on the rows | / unisono | CPU seconds | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in median.items():
        cells = [
            name,
            f"{own['seconds']:.1f}",
            f"{own['seconds'] / median[UNISONO]['seconds']:.2f}",
            f"{on_rows[name]:.1f}",
            f"{on_rows[name] / on_rows[UNISONO]:.2f}",
            f"{own['cpu_seconds']:.1f}",
            f"{max(found[name]['peak_mb']):.0f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--members", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("build/predict_table"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=CONTENDERS[1:], help=argparse.SUPPRESS)
    parser.add_argument("--input", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
