"""`Predictor`: what `unisono predict` gives for a file, for batches; on a local Ray too."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from small_tables import cancer_frame
from unisono.batch_prediction import Predictor
from unisono.commands.predict import PredictRequest, run_predict
from unisono.commands.run_folder import RUN, RunFolder, pack

SOURCE = Path(__file__).parents[2] / "src"


def exactly(message):
    return f"^{re.escape(message)}$"


def batch_of(frame):
    """As Ray makes them: an array for each column, of objects for texts."""
    return {name: frame[name].to_numpy() for name in frame.columns}


def predicted(run, source, output):
    request = PredictRequest(run, str(source), str(output), ("id",), device="cpu")
    run_predict(request, Console(quiet=True))
    return pd.read_parquet(output)


@pytest.mark.parametrize("name", ["cancer", "diabetes"])
def test_batches_give_what_the_command_gives(request, tables, tmp_path, name):
    run = request.getfixturevalue(f"{name}_run")
    frame = pd.read_parquet(tables / f"{name}.parquet").assign(id=lambda f: np.arange(len(f)))
    frame.to_parquet(tmp_path / "in.parquet")
    expected = predicted(run, tmp_path / "in.parquet", tmp_path / "out.parquet")
    predict = Predictor(run, keep=["id"], device="cpu")
    parts = [predict(batch_of(frame[start : start + 100])) for start in range(0, 600, 100)]
    found = pd.concat([pd.DataFrame(part) for part in parts], ignore_index=True)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-6)  # in float32


def test_kept_columns_are_passed_on_as_they_are(cancer_run):
    batch = batch_of(cancer_frame().head(5))
    batch["image"] = np.zeros((5, 2, 2))
    found = Predictor(cancer_run, keep=["image"], device="cpu")(batch)
    assert next(iter(found)) == "image"
    assert found["image"] is batch["image"]


def test_a_batch_without_rows_has_all_columns(cancer_run):
    predict = Predictor(cancer_run, keep=["id"], device="cpu")
    one, none = (predict(batch_of(cancer_frame().head(k))) for k in (1, 0))
    assert {name: own.dtype for name, own in none.items()} == {n: o.dtype for n, o in one.items()}
    assert {len(own) for own in none.values()} == {0}


def test_batches_that_do_not_fit(cancer_run):
    predict, frame = Predictor(cancer_run, keep=["id"], device="cpu"), cancer_frame().head(9)
    message = (
        r"^Predictor: the batch lacks mean radius, id; it has mean texture, size, marked, day, "
        r"always, kind$"
    )
    with pytest.raises(ValueError, match=message):
        predict(batch_of(frame.drop(columns=["id", "mean radius"])))
    message = "Predictor: column 'mean radius' holds texts; training had numbers"
    with pytest.raises(ValueError, match=exactly(message)):
        predict(batch_of(frame.assign(**{"mean radius": "wide"})))
    unseen = frame.assign(size="giant")
    message = (
        "Predictor: the batch has values that training never saw: column 'size': 'giant' in 9 rows "
        '(first: row 1); unseen="ignore" predicts nevertheless'
    )
    with pytest.raises(ValueError, match=exactly(message)):
        predict(batch_of(unseen))
    ignoring = Predictor(cancer_run, unseen="ignore", device="cpu")
    assert len(ignoring(batch_of(unseen))["total"]) == 9
    with pytest.raises(ValueError, match=r"'mean radius': infinite in 9 rows \(first: row 1\)$"):
        ignoring(batch_of(frame.assign(**{"mean radius": np.inf})))
    with pytest.raises(ValueError, match=r"'mean radius': too large in 9 rows \(first: row 1\)$"):
        ignoring(batch_of(frame.assign(**{"mean radius": 1e300})))


def test_what_a_predictor_cannot_be_made_of(cancer_run, tmp_path):
    with pytest.raises(
        ValueError, match=r'^Predictor: unseen is "error" or "ignore", got \'drop\''
    ):
        Predictor(cancer_run, unseen="drop")
    with pytest.raises(ValueError, match=r"^Predictor: keep is a sequence of names, got 'id'$"):
        Predictor(cancer_run, keep="id")
    with pytest.raises(ValueError, match=r"^Predictor: keep has names of results: total; rename"):
        Predictor(cancer_run, keep=["total"], device="cpu")
    run = shutil.copytree(cancer_run, tmp_path / "run")
    values = vars(RunFolder(run).description) | {"kind": "images"}
    (run / RUN).write_bytes(pack(type(RunFolder(run).description)(**values), {})[RUN])
    with pytest.raises(ValueError, match=r"run is a run on the images cancer\.csv; predict takes"):
        Predictor(run)


def test_importing_it_brings_nothing_of_the_terminal():
    script = (
        "import sys, unisono.batch_prediction\n"
        "print({'typer', 'rich', 'pyarrow', 'sklearn', 'ray'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what Ray does is its own affair
def test_a_local_ray(cancer_run, tables, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs unisono[ray]")
    import ray

    import ray_data

    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    table = pq.read_table(tables / "cancer.parquet")
    (tmp_path / "in").mkdir()
    for k in range(3):
        pq.write_table(table.slice(200 * k, 200), tmp_path / "in" / f"{k}.parquet")
    expected = predicted(cancer_run, tables / "cancer.parquet", tmp_path / "out.parquet")
    ray_data.start_ray()
    try:
        ray_data.predict(str(cancer_run), str(tmp_path / "in"), str(tmp_path / "predicted"))
    finally:
        ray.shutdown()
    found = pd.read_parquet(tmp_path / "predicted").sort_values("id", ignore_index=True)
    pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-6)  # in float32
