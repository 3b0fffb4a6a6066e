"""From the folder of a run to a file: what is read, what is refused, what is left alone."""

import json
import os

import numpy as np
import pyarrow as pa
import pytest
import torch

from unisono.commands.columns import Column
from unisono.commands.outcome import ArgumentError
from unisono.commands.run_folder import (
    METRICS,
    PLAN,
    RUN,
    TEST_OUTPUTS,
    TEST_TABLE,
    Description,
    TestOutputs,
    pack,
    pack_outputs,
    to_json,
)
from unisono.commands.table_files import to_parquet
from unisono.report import read_run, write_report

ROWS = 30
METRICS_OF_A_RUN = {
    "data": "people.csv",
    "members": 2,
    "lr": [1e-3, 1e-2],
    "batch_size": 64,
    "torch": "2.13.0",
    "accuracy": {"members": [0.5, 0.6]},
    "train_loss": [[1.0, 2.0], [0.5, None]],
    "validation_loss": None,
    "stopped": ["", "patience"],
    "best_epoch": [1, 0],
}


@pytest.fixture
def folder(tmp_path, plan):
    """The folder of a run on a table."""
    description = Description(
        kind="table",
        task="classification",
        data="people.csv",
        classes=("no", "yes"),
        target="y",
        columns=(Column("x", "number", "double", True), Column("c", "category", "string", False)),
        dropped={"id": "a different text in every row"},
        versions={"torch": "2.13.0"},
    )
    outputs = TestOutputs(
        torch.randn(2, ROWS, 2), torch.arange(ROWS) % 2, 10 * torch.arange(ROWS) + 1
    )
    table = pa.table({"x": np.arange(ROWS) + 0.5, "c": ["a"] * ROWS, "y": ["no", "yes"] * 15})
    write(tmp_path / "run", description, outputs, {TEST_TABLE: to_parquet(table)}, plan)
    return tmp_path / "run"


def write(path, description, outputs, more, plan):
    path.mkdir()
    contents = {METRICS: to_json(METRICS_OF_A_RUN), TEST_OUTPUTS: pack_outputs(outputs), **more}
    for name, content in pack(description, {**contents, PLAN: to_json(plan)}).items():
        (path / name).write_bytes(content)


def test_a_report_is_written_into_the_folder_of_the_run(folder):
    before = set(folder.iterdir())
    file = write_report(folder)
    assert file == folder / "report.html"
    assert set(folder.iterdir()) == before | {file}
    page = file.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert write_report(os.fspath(folder)).read_text(encoding="utf-8") == page


def test_a_folder_is_read_as_a_run(folder):
    run = read_run(folder)
    assert run.name == "run"
    assert run.outputs.shape == (2, ROWS, 2)
    assert run.rows[:3].tolist() == [1, 11, 21]
    assert run.class_names == ("no", "yes")
    assert run.settings == {
        "data": "people.csv",
        "members": 2,
        "lr": [1e-3, 1e-2],
        "batch size": 64,
        "versions": {"torch": "2.13.0"},
    }
    np.testing.assert_array_equal(run.loss, [[1.0, 2.0], [0.5, np.nan]])
    assert run.validation_loss is None
    assert [column["used as"] for column in run.columns] == [
        "number",
        "category",
        "left out: a different text in every row",
    ]
    assert run.plan["strategy"] == "fused"


def test_images_are_read(tmp_path, plan):
    images = torch.randint(256, (ROWS, 1, 4, 4), dtype=torch.uint8)
    outputs = TestOutputs(
        torch.randn(2, ROWS, 3), torch.arange(ROWS) % 3, torch.arange(ROWS), images
    )
    description = Description(
        kind="images", task="classification", data="digits", classes=(0, 1, 2)
    )
    write(tmp_path / "run", description, outputs, {}, plan)
    run = read_run(tmp_path / "run")
    np.testing.assert_array_equal(run.images, images.numpy())
    assert run.class_names == ("0", "1", "2")
    assert 'alt="test image ' in write_report(tmp_path / "run").read_text(encoding="utf-8")


def test_an_older_report_stays_if_the_new_one_fails(folder, monkeypatch):
    (folder / "report.html").write_text("older")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(folder)
    assert (folder / "report.html").read_text() == "older"
    assert [path for path in folder.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize("name", [METRICS, TEST_OUTPUTS, TEST_TABLE, PLAN])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    message = (
        f"can't read {folder / name}: No such file or directory; train again, or take a whole copy "
        "of the folder"
    )
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        write_report(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name", [METRICS, TEST_OUTPUTS, TEST_TABLE, PLAN])
def test_a_truncated_file_is_named_with_a_remedy(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    message = (
        rf"{folder / name} can't be used: it isn't the file that run.json describes: cut off, "
        rf"changed or of another run \({len(content) // 2:,} bytes\); train again, or take an "
        "undamaged copy"
    )
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_folder_without_a_run_is_refused(tmp_path):
    message = f"{tmp_path} has no run.json, so it isn't a run that unisono train finished"
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        write_report(tmp_path)


def test_outputs_of_another_run_are_refused(folder):
    values = json.loads((folder / RUN).read_text())
    values["classes"] = ["a", "b", "c"]
    (folder / RUN).write_text(json.dumps(values))
    message = (
        f"{folder} can't be used: the run run can't be reported on: 3 classes are named, but "
        "outputs have 2; train again"
    )
    with pytest.raises(ArgumentError, match=f"^{message}$"):
        write_report(folder)
