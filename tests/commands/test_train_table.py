"""`unisono train` on a table."""

import dataclasses
import json
import os
import re

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from scipy.stats import norm
from sklearn.metrics import accuracy_score, log_loss, r2_score, root_mean_squared_error

from small_tables import FEATURES, cancer_frame, diabetes_frame
from unisono.commands.outcome import ArgumentError
from unisono.commands.run_folder import METRICS, RunFolder
from unisono.commands.targets import Target, split_rows
from unisono.commands.train_table import TableRequest, run_train_table
from unisono.estimators import EnsembleClassifier

FILES = [
    *("curves.png", "metrics.json", "model.safetensors", "plan.json"),
    *("preprocessing.safetensors", "preprocessing.skops"),
    *("run.json", "test_outputs.safetensors", "test_table.parquet"),
]


def train(data, target="kind", task="classification", **changes):
    values = {"members": 2, "epochs": 1, "device": "cpu", "patience": 0} | changes
    return run_train_table(TableRequest(data, target, task, **values), Console(quiet=True))


def write(tmp_path, text, name="table.csv"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def exactly(message):
    return f"^{re.escape(message)}$"


def features_by_hand(frame, train_rows):
    """Median, indicator, mean and standard deviation, one column for each category."""
    columns, fitted = [], frame.iloc[train_rows]
    numbers = frame[["mean radius", "mean texture"]]
    filled = numbers.fillna(fitted[["mean radius", "mean texture"]].median())
    parts = pd.concat([filled, numbers[["mean radius"]].isna().astype(float)], axis=1)
    known = parts.iloc[train_rows]
    columns.append(((parts - known.mean()) / known.std(ddof=0)).to_numpy())
    size = frame["size"]
    columns += [
        (size == name).to_numpy()[:, None] for name in sorted(fitted["size"].dropna().unique())
    ]
    columns.append(size.isna().to_numpy()[:, None])
    columns += [(frame["marked"] == value).to_numpy()[:, None] for value in (False, True)]
    return np.hstack(columns).astype(np.float32)


def test_the_run_equals_the_estimator_on_features_by_hand(cancer_run):
    run, frame = RunFolder(cancer_run), cancer_frame()
    targets = (frame["kind"] == "malignant").to_numpy().astype(np.int64)
    train_rows, test_rows = split_rows(Target(targets, ("benign", "malignant")), 0.2, 0)
    features = features_by_hand(frame, train_rows)
    model = EnsembleClassifier(n_members=3, max_epochs=3, patience=None, random_state=0)
    model.fit(features[train_rows], targets[train_rows])
    logits = model.predict_members(features[test_rows])
    found = run.test_outputs()
    assert found.rows.tolist() == (test_rows + 1).tolist()
    assert found.targets.tolist() == targets[test_rows].tolist()
    # float32, and features that were added up in another order
    torch.testing.assert_close(found.outputs, torch.from_numpy(logits), rtol=1e-3, atol=1e-4)
    shares = torch.from_numpy(logits).double().softmax(-1).numpy()
    metrics = run.metrics()
    for i, own in enumerate(shares):
        right = accuracy_score(targets[test_rows], own.argmax(1))
        assert metrics["accuracy"]["members"][i] == pytest.approx(right)
    surprise = log_loss(targets[test_rows], shares.mean(0))
    assert metrics["nll"]["ensemble_mean_probability"] == pytest.approx(surprise, rel=1e-3)


def test_scores_of_a_regression(diabetes_run):
    run, frame = RunFolder(diabetes_run), diabetes_frame()
    found, metrics = run.test_outputs(), run.metrics()
    values = frame["target"].to_numpy()[found.rows.numpy() - 1]
    assert found.targets.tolist() == values.tolist()
    mean, log_variance = found.outputs.double().unbind(-1)
    for i in range(3):
        own = root_mean_squared_error(values, mean[i])
        assert metrics["rmse"]["members"][i] == pytest.approx(own, rel=1e-5)
        assert metrics["r2"]["members"][i] == pytest.approx(r2_score(values, mean[i]), rel=1e-4)
    combined = mean.mean(0).numpy()
    assert metrics["rmse"]["ensemble"] == pytest.approx(
        root_mean_squared_error(values, combined), rel=1e-5
    )
    density = norm.pdf(values, mean.numpy(), (log_variance / 2).exp().numpy()).mean(0)
    assert metrics["nll"]["ensemble"] == pytest.approx(-np.log(density).mean(), rel=1e-5)


def test_csv_and_parquet_give_the_same_run(tables, tmp_path):
    runs = []
    for end in ("csv", "parquet"):
        metrics = train(tables / f"cancer.{end}", out=tmp_path / end).metrics
        runs.append({**metrics, "data": ""})
    assert runs[0] == runs[1]
    one, other = (RunFolder(tmp_path / end).description for end in ("csv", "parquet"))
    assert one.columns == other.columns


def test_a_run_says_what_it_did(tables, tmp_path):
    report = train(tables / "cancer.csv", out=tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run")) == FILES
    assert json.loads((tmp_path / "run" / METRICS).read_text()) == report.metrics
    assert report.metrics["train_rows"] == 455
    assert report.metrics["test_rows"] == 114
    assert report.notes[:3] == [
        "column 'id' is left out: another text in every row, like an identifier",
        "column 'day' is left out: date32[day] is neither number nor text nor boolean",
        "column 'always' is left out: always 1",
    ]
    run = RunFolder(tmp_path / "run")
    about = run.description
    assert about.classes == ("benign", "malignant")
    assert [column.name for column in about.columns] == FEATURES
    assert [column.missing for column in about.columns] == [True, False, True, False]
    assert about.columns[2].categories == ("huge", "large", "small", "tiny")
    assert about.columns[3].categories == ("false", "true")
    table, found = run.test_table(), run.test_outputs()
    assert table.column_names == [*FEATURES, "kind"]
    labels = np.array(about.classes)[found.targets.numpy()]
    assert table["kind"].to_pylist() == labels.tolist()
    assert run.plan()["ops"][-1]["path"] == "output"


def test_the_test_rows_have_every_class_and_follow_the_seed():
    target = Target(np.arange(100) % 5, tuple("abcde"))
    splits = [split_rows(target, 0.2, seed) for seed in (0, 0, 1)]
    for train_rows, test_rows in splits:
        assert sorted([*train_rows, *test_rows]) == list(range(100))
        assert np.bincount(target.values[test_rows]).tolist() == [4] * 5
    assert splits[0][1].tolist() == splits[1][1].tolist() != splits[2][1].tolist()


def test_numbers_that_are_categories_and_columns_left_out(tables, tmp_path):
    frame = cancer_frame()
    frame["ward"] = np.arange(len(frame)) % 3
    frame.to_parquet(tmp_path / "t.parquet")
    train(
        tmp_path / "t.parquet",
        categorical=("ward",),
        drop=("size", "marked"),
        out=tmp_path / "run",
    )
    about = RunFolder(tmp_path / "run").description
    assert {column.name: column.categories for column in about.columns} == {
        "mean radius": (),
        "mean texture": (),
        "ward": ("0", "1", "2"),
    }
    assert about.dropped["size"] == "--drop"


def test_what_is_only_in_the_test_rows_is_told(tmp_path):
    target = Target(np.arange(50) % 2, ("a", "b"))
    _, test_rows = split_rows(target, 0.2, 0)
    colours = np.array(["red", "blue"])[np.arange(50) // 2 % 2].astype(object)
    colours[test_rows[1]] = "green"
    numbers = np.arange(50.0)
    numbers[test_rows[2]] = np.nan
    frame = pd.DataFrame({"c": colours, "x": numbers, "y": np.array(["a", "b"])[target.values]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    notes = train(tmp_path / "t.csv", "y", batch_size=8, out=tmp_path / "run").notes
    assert notes == [
        f"only in the test rows: column 'c': 'green' in 1 row (row {test_rows[1] + 1})",
        f"only in the test rows: column 'x': missing in 1 row (row {test_rows[2] + 1})",
    ]


def test_a_factory_of_the_user(tables, tmp_path, monkeypatch):
    (tmp_path / "point_nets.py").write_text(
        "from torch import nn\n"
        "def make(n_features, n_outputs):\n    return nn.Linear(n_features, n_outputs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = tables / "diabetes.csv"
    out = tmp_path / "run"
    metrics = train(data, "target", "regression", model="point_nets:make", out=out).metrics
    assert "nll" not in metrics  # members that predict points have no likelihood
    assert RunFolder(out).test_outputs().outputs.shape == (2, 89, 1)


def test_one_member(tables, tmp_path):
    metrics = train(tables / "cancer.csv", members=1, out=tmp_path / "run").metrics
    assert metrics["accuracy"]["members"] == [metrics["accuracy"]["ensemble_mean_probability"]]


def test_rates_of_members_are_told(tables, tmp_path):
    report = train(
        tables / "diabetes.csv",
        "target",
        "regression",
        members=None,
        lr=("1e-2", "1e-3"),
        out=tmp_path / "run",
    )
    assert report.metrics["lr"] == [0.01, 0.001]
    assert report.metrics["members"] == 2


# Wrong input --------------------------------------------------------------------------------------

REQUESTS = [
    ({"target": None}, "--target is needed for {}: the column to predict"),
    ({"task": None}, "--task is needed for {}: classification or regression"),
    ({"task": "ranking"}, "unknown task 'ranking'; choose classification or regression"),
    ({"test_share": 1.0}, "--test-share must be between 0 and 1, got 1"),
    ({"members": 0}, "--members must be at least 1, got 0"),
    ({"patience": -1}, "--patience must be at least 0, got -1"),
    ({"model": "cnn"}, "unknown model 'cnn' for a table; choose mlp or package.module:factory"),
    ({"target": "sort"}, "--target sort: there is no such column; there are a, y"),
    ({"drop": ("b",)}, "--drop b: there is no such column; there are a"),
    ({"categorical": ("y",)}, "--categorical y: that is the target"),
    ({"drop": ("a",)}, "no column is left as a feature (a: --drop)"),
    ({"categorical": ("a",)}, "--categorical a: its numbers aren't whole"),
]
TABLE = "a,y\n" + "".join(f"{k / 2},{'no' if k % 2 else 'yes'}\n" for k in range(1, 31))


@pytest.mark.parametrize(("changes", "message"), REQUESTS, ids=[m for _, m in REQUESTS])
def test_a_request_that_cannot_be(tmp_path, changes, message):
    path = write(tmp_path, TABLE)
    values = {"target": "y", "task": "classification", "test_share": 0.4, "seed": 1} | changes
    request = TableRequest(path, out=tmp_path / "run", device="cpu", **values)
    with pytest.raises(ArgumentError, match=exactly(message.format(path))):
        run_train_table(request, Console(quiet=True))
    assert os.listdir(tmp_path) == ["table.csv"]


BODY = "".join(f"{k},{'n' if k % 2 else 'm'}\n" for k in range(40))
BAD_FILES = [
    ("", "classification", "{} is empty"),
    ("\n", "classification", "{} has no header"),
    ("a,y\n", "classification", "{} has a header and no rows"),
    (
        "a;y\n1;2\n",
        "classification",
        ("{} has one column, 'a;y'; its values seem to be separated by ';', and must be by commas"),
    ),
    ("a,a,y\n1,2,3\n", "classification", "{} has two columns of one name: a"),
    (
        "a,y\n1,2,3\n",
        "classification",
        "{}: CSV parse error: Row #1: Expected 2 columns, got 3: 1,2,3",
    ),
    (
        "a,y\n" + BODY.replace("m", "n"),
        "classification",
        ("--target y: every row is of class 'n'; two are needed"),
    ),
    (
        "a,y\n1,m\n2,m\n3,n\n",
        "classification",
        (
            "--target y: only 1 row is of class 'n'; a class needs one to "
            "train on and one to test on"
        ),
    ),
    (
        "a,y\n1,m\n2,m\n3,n\n4,n\n",
        "classification",
        (
            "--test-share 0.2 of 4 rows: The test_size = 1 should be greater or equal to the "
            "number of classes = 2"
        ),
    ),
    (
        "a,y\n" + BODY + "7,\n8,NA\n",
        "classification",
        (
            "--target y: the value is missing in 2 of 42 rows (first: row 41); take these "
            "rows out of the file"
        ),
    ),
    (
        "a,y\n" + BODY,
        "regression",
        ("--target y: string is no number; classes are learnt with --task classification"),
    ),
    (
        "a,y\n" + "".join(f"{k},{k + 0.5}\n" for k in range(40)),
        "classification",
        (
            "--target y: 40 different values in 40 rows are no classes; numbers are learnt "
            "with --task regression"
        ),
    ),
    ("a,y\n" + "1,2\n" * 9, "regression", "--target y: every row has the value 2"),
    ("a,y\n" + BODY + "inf,m\n", "classification", "{}: column 'a': infinite in 1 row (row 41)"),
    ("a,y\n" + "1,m\n1,n\n" * 9, "classification", "no column is left as a feature (a: always 1)"),
    ("a,y\n" + ",m\n,n\n" * 9, "classification", "no column is left as a feature (a: no values)"),
    (
        "a,y\n" + BODY.replace("m", "\xe9"),
        "classification",
        ("{} isn't UTF-8; convert it first, as: iconv -f latin1 -t utf-8 table.csv > utf8.csv"),
    ),
]


@pytest.mark.parametrize(("text", "task", "message"), BAD_FILES, ids=[m for *_, m in BAD_FILES])
def test_a_file_that_cannot_be_trained_on(tmp_path, text, task, message):
    path = write(tmp_path, text.encode("latin1"))
    with pytest.raises(ArgumentError, match=exactly(message.format(path))):
        train(path, "y", task, batch_size=4, out=tmp_path / "run")
    assert os.listdir(tmp_path) == ["table.csv"]


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(ArgumentError, match=r"^can't read .*: No such file or directory$"):
        train(tmp_path / "none.csv")
    path = write(tmp_path, "a,y\n1,2\n", "text.parquet")
    with pytest.raises(ArgumentError, match=r"^.*isn't a Parquet file that can be read: "):
        train(path)


def test_a_module_that_does_not_suit_is_found_before_training(tables, tmp_path, monkeypatch):
    (tmp_path / "narrow_nets.py").write_text(
        "from torch import nn\n"
        "def make(n_features, n_outputs):\n    return nn.Linear(3, n_outputs)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArgumentError, match=r"^--model narrow_nets:make: RuntimeError: mat1 and "):
        train(
            tables / "diabetes.csv",
            "target",
            "regression",
            model="narrow_nets:make",
            out=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_ctrl_c_leaves_nothing(tables, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    from unisono.commands.outcome import Interrupted

    monkeypatch.setattr(EnsembleClassifier, "fit", interrupt)
    with pytest.raises(Interrupted, match=r"^interrupted; nothing was written$"):
        train(tables / "cancer.csv", out=tmp_path / "run")
    assert os.listdir(tmp_path) == []


def test_the_defaults_are_those_of_the_estimator():
    request, estimator = TableRequest(), EnsembleClassifier()
    assert request.epochs == estimator.max_epochs
    assert request.batch_size == estimator.batch_size
    assert request.patience == estimator.patience
    assert request.sampling == estimator.sampling
    assert [float(rate) for rate in request.lr] == [estimator.learning_rate]


def test_a_request_has_the_fields_of_its_docstring():
    fields = [field.name for field in dataclasses.fields(TableRequest)]
    assert all(f"{name}: " in TableRequest.__doc__ for name in fields)
