"""`unisono predict`: the numbers, the stream, and everything that can be wrong with a file."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from small_tables import FEATURES, cancer_frame, diabetes_frame
from unisono.commands import csv_files, table_files
from unisono.commands.features import encode
from unisono.commands.outcome import ArgumentError, CommandError, Interrupted
from unisono.commands.plain_preprocessing import pack_plain, to_plain
from unisono.commands.predict import PredictRequest, run_predict
from unisono.commands.preprocessing import fit_preprocessing, to_features
from unisono.commands.run_folder import MODEL, PREPROCESSING, RUN, RunFolder, pack
from unisono.commands.table_estimator import load_members
from unisono.commands.table_stream import Stream
from unisono.estimators import from_state

SOURCE = Path(__file__).parents[2] / "src"


def predict(run, source, output, **options):
    request = PredictRequest(run, str(source), str(output), device="cpu", **options)
    return run_predict(request, Console(quiet=True))


def exactly(message):
    return f"^{re.escape(message)}$"


def frame_of(path):
    return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)


def features_of(run, frame):
    about = run.description
    batch = pa.RecordBatch.from_pandas(frame[[c.name for c in about.columns]])
    values, findings = encode(batch, about.columns)
    assert findings == []
    return torch.from_numpy(to_features(run.pipeline(), values))


# The numbers --------------------------------------------------------------------------------------


def test_predictions_equal_the_loop_over_the_members(cancer_run, tables, tmp_path):
    run = RunFolder(cancer_run)
    members = load_members(run, None, torch.device("cpu")).ensemble.unstack()
    features = features_of(run, cancer_frame())
    with torch.no_grad():
        shares = torch.stack([m(features).double().softmax(-1) for m in members])  # (N, B, C)
    mean = shares.mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    aleatoric = -(shares * shares.log()).sum(-1).mean(0)
    report = predict(cancer_run, tables / "cancer.csv", tmp_path / "out.parquet")
    found = frame_of(tmp_path / "out.parquet")
    assert report.rows == len(found) == len(features)
    assert list(found.columns) == [
        *("prediction", "probability_benign", "probability_malignant"),
        *("total", "aleatoric", "epistemic"),
    ]
    labels = np.array(["benign", "malignant"])[mean.argmax(-1).numpy()]
    assert found["prediction"].tolist() == labels.tolist()
    expected = {
        "probability_benign": mean[:, 0],
        "probability_malignant": mean[:, 1],
        "total": entropy,
        "aleatoric": aleatoric,
        "epistemic": entropy - aleatoric,
    }
    for name, values in expected.items():
        own = torch.tensor(found[name]).double()
        torch.testing.assert_close(own, values, rtol=1e-4, atol=1e-6, msg=name)  # in float32


def test_uncertainty_of_numbers_is_a_standard_deviation(diabetes_run, tables, tmp_path):
    run = RunFolder(diabetes_run)
    estimator = from_state(run.description.estimator, run.tensors(MODEL))
    mean, variance = estimator.predict_members(features_of(run, diabetes_frame()).numpy())
    predict(diabetes_run, tables / "diabetes.csv", tmp_path / "out.csv")
    found = frame_of(tmp_path / "out.csv")
    assert list(found.columns) == ["prediction", "total", "aleatoric", "epistemic"]
    expected = {
        "prediction": mean.mean(0),
        "aleatoric": np.sqrt(variance.mean(0)),
        "epistemic": mean.std(0),
        "total": np.sqrt(variance.mean(0) + mean.var(0)),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, err_msg=name)  # in float32


def test_every_format_gives_the_same(cancer_run, tables, tmp_path):
    for source in ("csv", "parquet"):
        for output in ("csv", "parquet"):
            path = tmp_path / f"from_{source}.{output}"
            predict(cancer_run, tables / f"cancer.{source}", path)
    one, *others = [frame_of(path) for path in sorted(tmp_path.iterdir())]
    for other in others:
        pd.testing.assert_frame_equal(one, other, check_dtype=False, rtol=1e-6)  # float32
    metadata = pq.read_schema(tmp_path / "from_csv.parquet").metadata
    assert metadata[b"uncertainty"] == b"nats"


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 7, 100_000])
def test_the_size_of_a_batch_changes_nothing(
    cancer_run, tables, tmp_path, monkeypatch, rows, threads
):
    table = pq.read_table(tables / "cancer.parquet").slice(0, 40)
    pq.write_table(table, tmp_path / "rows.parquet")
    table.to_pandas().to_csv(tmp_path / "rows.csv", index=False)
    predict(cancer_run, tmp_path / "rows.csv", tmp_path / "whole.parquet", keep=("id",))
    monkeypatch.setattr(table_files, "_CELLS", rows * (len(FEATURES) + 1))
    torch.set_num_threads(threads)
    for source in ("csv", "parquet"):
        path = tmp_path / f"from_{source}.parquet"
        predict(cancer_run, tmp_path / f"rows.{source}", path, keep=("id",))
        whole, parts = frame_of(tmp_path / "whole.parquet"), frame_of(path)
        pd.testing.assert_frame_equal(whole, parts, rtol=1e-4, atol=1e-6)  # in float32
    assert torch.get_num_threads() == threads


def test_row_groups_and_order_of_columns_do_not_matter(cancer_run, tables, tmp_path):
    table = pq.read_table(tables / "cancer.parquet")
    turned = table.select(table.column_names[::-1])
    turned = turned.set_column(
        turned.column_names.index("size"), "size", turned["size"].dictionary_encode()
    )
    pq.write_table(turned, tmp_path / "turned.parquet", row_group_size=50)
    predict(cancer_run, tables / "cancer.parquet", tmp_path / "a.csv")
    predict(cancer_run, tmp_path / "turned.parquet", tmp_path / "b.csv")
    pd.testing.assert_frame_equal(frame_of(tmp_path / "a.csv"), frame_of(tmp_path / "b.csv"))


def test_kept_columns_stand_before_the_results(cancer_run, tables, tmp_path):
    predict(cancer_run, tables / "cancer.csv", tmp_path / "two.csv", keep=("kind", "id"))
    found, frame = frame_of(tmp_path / "two.csv"), cancer_frame()
    assert list(found.columns)[:3] == ["kind", "id", "prediction"]
    assert found["id"].tolist() == frame["id"].tolist()
    predict(cancer_run, tables / "cancer.csv", tmp_path / "all.csv", keep=("all",))
    found = frame_of(tmp_path / "all.csv")
    assert list(found.columns)[: frame.shape[1]] == list(frame.columns)
    given = frame_of(tables / "cancer.csv")
    pd.testing.assert_frame_equal(found[list(frame.columns)], given)


def test_kept_texts_stay_as_they_are_written(cancer_run, tables, tmp_path):
    given = pd.read_csv(tables / "cancer.csv", dtype=str, keep_default_na=False).head(3)
    given["note"] = ["NA", "1.50", 'a "b",\nc']
    given.to_csv(tmp_path / "in.csv", index=False)
    predict(cancer_run, tmp_path / "in.csv", tmp_path / "out.csv", keep=("note",))
    found = pd.read_csv(tmp_path / "out.csv", dtype=str, keep_default_na=False)
    assert found["note"].tolist() == ["NA", "1.50", 'a "b",\nc']


def test_line_breaks_in_texts_where_a_block_ends(cancer_run, tables, tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "_BLOCK", 300)
    given = pd.read_csv(tables / "cancer.csv").head(40)
    given["note"] = [f"{k}\n,\n" * 9 for k in range(40)]
    given.to_csv(tmp_path / "in.csv", index=False)
    predict(cancer_run, tmp_path / "in.csv", tmp_path / "out.csv", keep=("note",))
    assert pd.read_csv(tmp_path / "out.csv")["note"].tolist() == given["note"].tolist()


def test_standard_input_and_output(diabetes_run, tables, tmp_path, monkeypatch):
    predict(diabetes_run, tables / "diabetes.csv", tmp_path / "file.csv")

    class Standard:
        buffer = io.BytesIO((tables / "diabetes.csv").read_bytes())

    class Captured:
        buffer = io.BytesIO()

    monkeypatch.setattr(sys, "stdin", Standard)
    with contextlib.redirect_stdout(Captured):
        predict(diabetes_run, "-", "-")
    assert Captured.buffer.getvalue() == (tmp_path / "file.csv").read_bytes()


def test_a_factory_is_imported_only_on_request(tables, tmp_path, monkeypatch):
    from unisono.commands.train_table import TableRequest, run_train_table

    (tmp_path / "wide_nets.py").write_text(
        "from torch import nn\n"
        "def make(n_features, n_outputs):\n    return nn.Linear(n_features, n_outputs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = {"model": "wide_nets:make", "members": 2, "epochs": 1, "device": "cpu"}
    request = TableRequest(
        tables / "diabetes.csv", "target", "regression", out=tmp_path / "run", **options
    )
    run_train_table(request, Console(quiet=True))
    del sys.modules["wide_nets"]
    source, run = tables / "diabetes.csv", tmp_path / "run"
    message = (
        f"the members of {run} are made by wide_nets:make; if you trust that code, add --model "
        "wide_nets:make"
    )
    with pytest.raises(ArgumentError, match=exactly(message)):
        predict(run, source, tmp_path / "out.csv")
    assert "wide_nets" not in sys.modules
    with pytest.raises(ArgumentError, match=r"^--model nets:other: the members of .* are made by "):
        predict(run, source, tmp_path / "out.csv", model="nets:other")
    predict(run, source, tmp_path / "out.csv", model="wide_nets:make")
    assert (frame_of(tmp_path / "out.csv")["aleatoric"] == 0).all()


def test_a_preprocessing_of_another_run_is_found(cancer_run, diabetes_run, tables, tmp_path):
    run = shutil.copytree(cancer_run, tmp_path / "run")
    about = RunFolder(run).description
    table = np.abs(np.random.default_rng(0).normal(size=(9, 4)))
    table[0, :2] = np.nan  # in one column more than in that run: one feature more
    fitted = fit_preprocessing(table, about.columns)
    names = json.loads((run / RUN).read_text())["files"]
    contents = {name: (run / name).read_bytes() for name in names}
    contents[PREPROCESSING] = pack_plain(to_plain(fitted, about.columns))
    for name, content in pack(about, contents).items():
        (run / name).write_bytes(content)
    message = (
        r"preprocessing\.safetensors can't be used: its features aren't those of "
        r"model\.safetensors: X has shape \(1, 11\), but the members take 10 features; "
    )
    with pytest.raises(ArgumentError, match=message):
        predict(run, tables / "cancer.csv", tmp_path / "out.csv")
    assert os.listdir(tmp_path) == ["run"]


# Values that training never saw -------------------------------------------------------------------


def changed(tmp_path, changes):
    """The first ten rows, with other values in some places."""
    frame = cancer_frame().head(10)
    frame["size"] = "tiny"
    frame["mean radius"] = 10.0
    for (row, name), value in changes.items():
        frame[name] = frame[name].astype(object)
        frame.loc[row - 1, name] = value
    path = tmp_path / "rows.csv"
    frame.to_csv(path, index=False)
    return path


def test_all_values_that_training_never_saw_are_told_at_once(cancer_run, tmp_path, monkeypatch):
    path = changed(
        tmp_path,
        {
            (5, "size"): "giant",
            (9, "size"): "dwarf",
            (2, "mean texture"): None,
            (5, "mean texture"): None,
            (7, "marked"): None,
        },
    )
    monkeypatch.setattr(table_files, "_CELLS", 3 * len(FEATURES))  # several batches
    message = (
        f"{path} has values that training never saw: "
        "column 'mean texture': missing in 2 rows (first: row 2); "
        "column 'size': 'giant', 'dwarf' in 2 rows (first: row 5); "
        "column 'marked': missing in 1 row (row 7); "
        "add --unseen ignore to predict nevertheless"
    )
    with pytest.raises(ArgumentError, match=exactly(message)):
        predict(cancer_run, path, tmp_path / "out.csv")
    assert os.listdir(tmp_path) == ["rows.csv"]


def test_what_is_ignored_is_said(cancer_run, tmp_path):
    path = changed(tmp_path, {(3, "size"): "giant", (5, "mean texture"): None})
    report = predict(cancer_run, path, tmp_path / "out.csv", unseen="ignore")
    assert report.notes == [
        "training never saw: column 'mean texture': missing in 1 row (row 5)",
        "training never saw: column 'size': 'giant' in 1 row (row 3)",
    ]
    found = frame_of(tmp_path / "out.csv")
    assert found.notna().all(axis=None)
    # A category that is unknown gives zeros; a missing number the median.
    run = RunFolder(cancer_run)
    row = features_of(run, cancer_frame().head(1).assign(**{"size": "tiny", "mean radius": 10.0}))
    assert row.shape[1] == 3 + 5 + 2


def test_missing_values_are_fine_where_training_had_some(cancer_run, tmp_path):
    path = changed(tmp_path, {(3, "size"): None, (5, "mean radius"): None})
    assert predict(cancer_run, path, tmp_path / "out.csv").notes == []


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({(4, "mean radius"): np.inf}, "column 'mean radius': infinite in 1 row (row 4)"),
        (  # for float32
            {(4, "mean radius"): 1e300, (2, "mean texture"): -1e200, (9, "mean texture"): 1e199},
            (
                "column 'mean radius': too large in 1 row (row 4); "
                "column 'mean texture': too large in 2 rows (first: row 2)"
            ),
        ),
    ],
)
def test_numbers_that_are_an_error_in_any_case(cancer_run, tmp_path, changes, facts):
    path = changed(tmp_path, changes)
    message = f"{path} has values that training never saw: {facts}"
    for unseen in ("error", "ignore"):
        with pytest.raises(ArgumentError, match=exactly(message)):
            predict(cancer_run, path, tmp_path / "out.csv", unseen=unseen)
    assert not (tmp_path / "out.csv").exists()


# Files that don't fit -----------------------------------------------------------------------------

HEADER = "mean radius,mean texture,size,marked\n"
BAD_FILES = [
    ("", "{} is empty"),
    (HEADER, "{} has a header and no rows"),
    (
        "a,b\n1,2\n",
        (
            "{} lacks 4 of the 4 columns of the training: mean radius, mean texture, size, marked; "
            "it has a, b"
        ),
    ),
    (
        "mean radius,size,marked\n1,tiny,true\n",
        (
            "{} lacks 1 of the 4 columns of the training: mean texture; "
            "it has mean radius, size, marked"
        ),
    ),
    (
        HEADER + "1,2,tiny,true\n1,wide,tiny,true\n",
        "{}: row 2, column 'mean texture': a number is expected, as in the training, got 'wide'",
    ),
    (
        HEADER + "1,2,tiny,true\n1,2,tiny,maybe\n",
        "{}: row 2, column 'marked': true or false is expected, as in the training, got 'maybe'",
    ),
    (HEADER + "1,2,tiny\n", "{}: CSV parse error: Row #1: Expected 4 columns, got 3: 1,2,tiny"),
    (
        HEADER + "1,2,t\xedny,true\n",
        "{} isn't UTF-8; convert it first, as: iconv -f latin1 -t utf-8 rows.csv > utf8.csv",
    ),
    (HEADER.replace(",", ";") + "1;2;tiny;true\n", None),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=[str(m) for _, m in BAD_FILES])
def test_a_file_that_does_not_fit(cancer_run, tmp_path, text, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(text.encode("latin1"))
    message = message or (
        "{} has one column, 'mean radius;mean texture;size;marked'; its values seem to be "
        "separated by ';', and must be by commas"
    )
    with pytest.raises(ArgumentError, match=exactly(message.format(path))):
        predict(cancer_run, path, tmp_path / "out.csv")
    assert os.listdir(tmp_path) == ["rows.csv"]


def test_an_error_far_down_in_a_file_names_its_row(cancer_run, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(HEADER + "1,2,tiny,true\n" * 400_000 + "1,x,tiny,true\n")
    message = (
        f"{path}: row 400,001, column 'mean texture': a number is expected, as in the training, "
        "got 'x'"
    )
    with pytest.raises(ArgumentError, match=exactly(message)):
        predict(cancer_run, path, tmp_path / "out.csv")
    assert os.listdir(tmp_path) == ["rows.csv"]


def test_parquet_that_does_not_fit(cancer_run, tables, tmp_path):
    table = pq.read_table(tables / "cancer.parquet")
    wrong = table.set_column(1, "mean radius", table["id"]).set_column(3, "size", table[1])
    path = tmp_path / "rows.parquet"
    pq.write_table(wrong, path)
    message = (
        f"{path}: column 'mean radius' holds texts; training had numbers; "
        "column 'size' holds numbers; training had texts"
    )
    with pytest.raises(ArgumentError, match=exactly(message)):
        predict(cancer_run, path, tmp_path / "out.csv")
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(ArgumentError, match=exactly(f"{path} has no rows")):
        predict(cancer_run, path, tmp_path / "out.csv")
    whole = (tables / "cancer.parquet").read_bytes()
    half = len(whole) // 2  # all pages of the features are in there
    for content in (whole[:-100], b"PAR1" + bytes(100), bytes(half) + whole[half:]):
        path.write_bytes(content)
        with pytest.raises(ArgumentError, match=r"^.*rows\.parquet isn't a Parquet file that can"):
            predict(cancer_run, path, tmp_path / "out.csv")
    assert os.listdir(tmp_path) == ["rows.parquet"]


def test_paths_that_cannot_be(cancer_run, tables, tmp_path):
    source = tables / "cancer.csv"
    (tmp_path / "folder.csv").mkdir()
    wrong = [
        (source, "out.txt", "--output {}: a file that ends in .csv or .parquet is expected, or -"),
        (source, "none/out.csv", f"--output {{}}: there is no folder {tmp_path / 'none'}"),
        (source, "folder.csv", "--output {} is a folder; give a file"),
    ]
    for given, name, message in wrong:
        output = tmp_path / name
        with pytest.raises(ArgumentError, match=exactly(message.format(output))):
            predict(cancer_run, given, output)
    copy = tmp_path / "copy.csv"
    copy.write_bytes(source.read_bytes())
    (tmp_path / "link.csv").symlink_to(copy)
    for name in ("copy.csv", "link.csv"):
        with pytest.raises(ArgumentError, match=r"^--output .* is the input; give another file$"):
            predict(cancer_run, copy, tmp_path / name)
    assert copy.read_bytes() == source.read_bytes()
    with pytest.raises(ArgumentError, match=r"^can't read .*none\.csv: No such file or directory$"):
        predict(cancer_run, tmp_path / "none.csv", tmp_path / "out.csv")
    with pytest.raises(
        ArgumentError, match=r"^--keep name: .*cancer\.csv has no such column, but "
    ):
        predict(cancer_run, source, tmp_path / "out.csv", keep=("name",))
    with pytest.raises(
        ArgumentError, match=r"^unknown policy for --unseen 'drop'; choose error or"
    ):
        predict(cancer_run, source, tmp_path / "out.csv", unseen="drop")


def test_a_column_called_like_a_result(diabetes_run, tables, tmp_path):
    frame = diabetes_frame().assign(total=1.0)
    frame.to_csv(tmp_path / "in.csv", index=False)
    message = (
        "--keep: the input has columns with names of results: total; rename them, or name the "
        "columns to keep without them"
    )
    with pytest.raises(ArgumentError, match=exactly(message)):
        predict(diabetes_run, tmp_path / "in.csv", tmp_path / "out.csv", keep=("all",))


def test_lists_cannot_be_kept_as_csv(diabetes_run, tmp_path):
    frame = diabetes_frame().head(2).assign(tags=[[1], [2]])
    frame.to_parquet(tmp_path / "in.parquet")
    with pytest.raises(ArgumentError, match=r"^CSV can't hold tags \(list<.*\); write a \.parquet"):
        predict(diabetes_run, tmp_path / "in.parquet", tmp_path / "out.csv", keep=("tags",))
    predict(diabetes_run, tmp_path / "in.parquet", tmp_path / "out.parquet", keep=("tags",))


# The disk and ctrl-C ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_a_full_disk_leaves_the_old_file(cancer_run, tables, tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = f"can't write to {tmp_path / name}: No space left on device"
    with pytest.raises(CommandError, match=exactly(message)):
        predict(cancer_run, tables / "cancer.csv", tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "old"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this file")
def test_a_disk_that_is_full_halfway(cancer_run, tables, tmp_path, monkeypatch):
    monkeypatch.setattr("unisono.commands.result_files._writer", _write_to_full_disk)
    with pytest.raises(CommandError, match=r"^can't write to .*: .*No space left on device"):
        predict(cancer_run, tables / "cancer.csv", tmp_path / "out.csv")
    assert os.listdir(tmp_path) == []


def _write_to_full_disk(path, new, schema):
    return pa.csv.CSVWriter("/dev/full", schema)


def test_an_interrupt_leaves_no_file(cancer_run, tables, tmp_path, monkeypatch):
    def interrupt(*_):
        assert (
            len(os.listdir(tmp_path)) == 1
        )  # the new file, so that the check below says something
        raise KeyboardInterrupt

    monkeypatch.setattr(Stream, "collect", interrupt)
    with pytest.raises(Interrupted, match=r"^interrupted; nothing was written$"):
        predict(cancer_run, tables / "cancer.csv", tmp_path / "out.csv")
    assert os.listdir(tmp_path) == []


def test_several_threads_say_nothing(cancer_run, tables, tmp_path):
    arguments = ["predict", str(cancer_run), "--input", str(tables / "cancer.csv")]
    done = subprocess.run(
        [sys.executable, "-m", "unisono.cli", *arguments, "--output", str(tmp_path / "out.csv")],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("predicted 569 rows in ")


# Each of them takes as long to import as many rows to predict; torch.utils.benchmark brings
# setuptools.
HEAVY = ("matplotlib", "scipy", "setuptools", "sklearn", "skops", "torch._dynamo", "torchmetrics")


@pytest.mark.parametrize(
    "source", ["cancer.parquet", pytest.param("cancer.csv", marks=pytest.mark.slow)]
)
def test_nothing_heavy_is_imported(cancer_run, tables, tmp_path, source):
    script = (
        "import json, sys\n"
        "from unisono.cli import main\n"
        "assert main(sys.argv[2:]) == 0\n"
        "print(json.dumps([name for name in json.loads(sys.argv[1]) if name in sys.modules]))\n"
    )
    arguments = ["predict", str(cancer_run), "--input", str(tables / source)]
    output = ["--output", str(tmp_path / "out.parquet")]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(HEAVY), *arguments, *output],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_ctrl_c_leaves_no_file_and_exits_130(cancer_run, tables, tmp_path):
    script = (
        "import sys, time\n"
        "from unisono.cli import main\n"
        "from unisono.commands.table_stream import Stream\n"
        "def wait(self, part):\n"
        "    print('working', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "Stream.collect = wait\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = ["predict", str(cancer_run), "--input", str(tables / "cancer.csv")]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments, "--output", str(tmp_path / "out.csv")],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr.readline() == "working\n"
        assert len(os.listdir(tmp_path)) == 1
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()  # nothing to one that has ended
    assert process.returncode == 130
    assert rest == "unisono predict: interrupted; nothing was written\n"
    assert os.listdir(tmp_path) == []
