"""Predictions with their uncertainty for a data set of Ray, where the data lies.

    pip install "unisono[ray]"
    python examples/ray_data.py

Each actor loads the run once and gets one batch of rows after another. This starts a Ray of its
own on this machine; in a cluster leave `start_ray` out, and put the run where all nodes see it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pandas as pd
import ray

from unisono.batch_prediction import Predictor
from unisono.cli import main as unisono

CPUS, ACTORS = 2, 1  # actors hold a CPU each for as long as they live; reading needs one too


def start_ray() -> None:
    """Start Ray on this machine: two CPUs, nothing that is sent elsewhere."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it reports to its makers otherwise
    ray.init(
        address="local",
        num_cpus=CPUS,
        object_store_memory=100 << 20,
        include_dashboard=False,
        _node_ip_address="127.0.0.1",
        logging_level="error",
        log_to_driver=False,
    )


def predict(run: str, source: str, target: str) -> None:
    """Predict every row of a folder of Parquet files; a key is kept, because order isn't."""
    rows = ray.data.read_parquet(source)
    results = rows.map_batches(
        Predictor,
        fn_constructor_args=[run],
        fn_constructor_kwargs={"keep": ["id"]},
        batch_size=4096,
        compute=ray.data.ActorPoolStrategy(size=ACTORS),
    )
    results.write_parquet(target)


def make_tables(folder: Path) -> None:
    """Write a table to train on, and four files of rows to predict."""
    from sklearn.datasets import load_breast_cancer

    frame = load_breast_cancer(as_frame=True).frame
    frame.drop(columns="target").assign(
        diagnosis=frame["target"].map({0: "malignant", 1: "benign"})
    ).to_parquet(folder / "train.parquet")
    (folder / "rows").mkdir()
    frame = frame.drop(columns="target").assign(id=range(len(frame)))
    for k in range(4):
        frame[k::4].to_parquet(folder / "rows" / f"{k}.parquet")


def main() -> None:
    """Train, start Ray, predict, and show the rows that the members disagree on most."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base)
        make_tables(folder)
        run = str(folder / "run")
        train = ["--data", str(folder / "train.parquet"), "--target", "diagnosis"]
        train += ["--task", "classification", "--epochs", "20", "--out", run]
        if unisono(["train", *train]):
            sys.exit("the training failed")
        start_ray()
        try:
            predict(run, str(folder / "rows"), str(folder / "predicted"))
        finally:
            ray.shutdown()
        found = pd.read_parquet(folder / "predicted")
        print(found.nlargest(5, "epistemic").to_string(index=False))


if __name__ == "__main__":
    main()
