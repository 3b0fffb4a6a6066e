"""The folder of a run: read back as written, and nothing in it trusted."""

import json
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import skops.io
import torch
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from unisono.commands.columns import Column
from unisono.commands.outcome import ArgumentError
from unisono.commands.plain_preprocessing import pack_plain, to_plain, unpack_plain
from unisono.commands.preprocessing import fit_preprocessing, from_skops, to_features, to_skops
from unisono.commands.run_folder import (
    METRICS,
    MODEL,
    PIPELINE,
    PLAN,
    PREPROCESSING,
    RUN,
    TEST_OUTPUTS,
    TEST_TABLE,
    Description,
    RunFolder,
    TestOutputs,
    pack,
    pack_outputs,
)
from unisono.commands.table_estimator import load_members

CPU = torch.device("cpu")
READ = {
    METRICS: lambda run: run.metrics(),
    PLAN: lambda run: run.plan(),
    MODEL: lambda run: load_members(run, None, CPU),
    PREPROCESSING: lambda run: run.preprocessing(),
    PIPELINE: lambda run: run.pipeline(),
    TEST_OUTPUTS: lambda run: run.test_outputs(),
    TEST_TABLE: lambda run: run.test_table(),
}


@pytest.fixture
def run(cancer_run, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(cancer_run, tmp_path / "run")


def exactly(message):
    return f"^{re.escape(message)}$"


def replace(run, name, content):
    """Put other content in place of a file, with the right digest."""
    description = RunFolder(run).description
    names = json.loads((run / RUN).read_text())["files"]
    contents = {own: (run / own).read_bytes() for own in names} | {name: content}
    for own, new in pack(description, contents).items():
        (run / own).write_bytes(new)


def test_what_is_written_is_read():
    columns = (
        Column("x", "number", "double", True),
        Column("c", "category", "int64", False, ("1", "2")),
    )
    written = Description(
        kind="table",
        task="classification",
        data="t.csv",
        classes=("a", "b"),
        target="y",
        columns=columns,
        dropped={"id": "like an identifier"},
        model="mlp",
        estimator={"format": 1},
        versions={"torch": "2"},
    )
    values = json.loads(pack(written, {})[RUN])
    assert values["format"] == 1
    assert [Column.from_json(own) for own in values["columns"]] == list(columns)


def test_a_run_is_read_back(tmp_path):
    outputs = TestOutputs(torch.randn(3, 5, 2), torch.arange(5) % 2, torch.arange(5))
    written = Description("images", "classification", "digits", classes=(0, 1))
    for name, content in pack(written, {TEST_OUTPUTS: pack_outputs(outputs)}).items():
        (tmp_path / name).write_bytes(content)
    run = RunFolder(tmp_path)
    assert run.description == written
    found = run.test_outputs()
    torch.testing.assert_close(found.outputs, outputs.outputs)
    assert found.inputs is None
    assert run.plan() is None
    assert run.test_table() is None
    with pytest.raises(
        ArgumentError, match=r"run\.json can't be used: it names no metrics\.json; "
    ):
        run.metrics()


# Damage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", READ)
def test_a_file_that_is_cut_off_is_named(run, name):
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[:-10])
    message = (
        f"{run / name} can't be used: it isn't the file that run.json describes: cut off, changed "
        f"or of another run ({len(content) - 10:,} bytes); train again, or take an undamaged copy"
    )
    with pytest.raises(ArgumentError, match=exactly(message)):
        READ[name](RunFolder(run))


@pytest.mark.parametrize("name", READ)
def test_a_file_that_is_missing_is_named(run, name):
    (run / name).unlink()
    message = (
        f"can't read {run / name}: No such file or directory; train again, or take a whole copy of "
        "the folder"
    )
    with pytest.raises(ArgumentError, match=exactly(message)):
        READ[name](RunFolder(run))


FOREIGN = {
    METRICS: "not JSON: ",
    PLAN: "not JSON: ",
    MODEL: "not safetensors: ",
    PREPROCESSING: "not safetensors: ",
    PIPELINE: "not a skops file: ",
    TEST_OUTPUTS: "not safetensors: ",
    TEST_TABLE: "not a Parquet file: ",
}


@pytest.mark.parametrize("name", READ)
def test_a_pickle_is_never_loaded(run, name, tmp_path):
    replace(run, name, pickle.dumps(Payload(tmp_path / "executed")))
    start = f"{run / name} can't be used: {FOREIGN[name]}"
    with pytest.raises(ArgumentError, match=f"^{re.escape(start)}"):
        READ[name](RunFolder(run))
    assert not (tmp_path / "executed").exists()


class Payload:
    """Whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{",
            "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
        ("[1]", "a JSON object is expected, found list"),
        ("{}", "KeyError: 'format'"),
        ('{"format": 9}', "ValueError: format 9, this version reads 1"),
        ('{"format": 1, "files": 3}', "AttributeError: 'int' object has no attribute 'items'"),
    ],
)
def test_a_damaged_description(run, text, message):
    (run / RUN).write_text(text)
    whole = f"{run / RUN} can't be used: {message}; train again, or take an undamaged copy"
    with pytest.raises(ArgumentError, match=exactly(whole)):
        RunFolder(run)


def test_what_is_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in (
        (tmp_path / "none", "{} doesn't exist; give the folder that unisono train wrote"),
        (tmp_path / "file", "{} is a file; give the folder that unisono train wrote"),
        (tmp_path, "{} has no run.json, so it isn't a run that unisono train finished"),
    ):
        with pytest.raises(ArgumentError, match=exactly(message.format(path))):
            RunFolder(path)


def test_tensors_that_do_not_belong_together(run):
    tensors = safetensors.torch.load_file(run / TEST_OUTPUTS)
    replace(run, TEST_OUTPUTS, safetensors.torch.save(tensors | {"targets": torch.zeros(3)}))
    with pytest.raises(
        ArgumentError, match=r"used: shapes that don't belong together: \{'outputs'"
    ):
        RunFolder(run).test_outputs()
    replace(run, TEST_OUTPUTS, safetensors.torch.save({"outputs": torch.zeros(3)}))
    with pytest.raises(ArgumentError, match=r"used: it has no tensor 'targets'; "):
        RunFolder(run).test_outputs()
    model = safetensors.torch.load_file(run / MODEL)
    model.pop("members.output.bias")
    replace(run, MODEL, safetensors.torch.save(model))
    with pytest.raises(ArgumentError, match=r"model\.safetensors can't be used: from_state: "):
        load_members(RunFolder(run), None, CPU)


# The preprocessing --------------------------------------------------------------------------------

NUMBER = Column("x", "number", "double", True)
COMPLETE = Column("z", "number", "double", False)
CATEGORY = Column("c", "category", "string", False, ("a", "b", "c"))


COLUMNS = [
    [NUMBER],
    [CATEGORY],
    [COMPLETE],
    [NUMBER, COMPLETE, NUMBER],
    [CATEGORY, NUMBER, CATEGORY, COMPLETE],
]


def names(columns):
    return "".join(column.name for column in columns)


def table_of(columns, random, rows):
    """Encoded rows, with values missing where the column says so."""
    table = np.stack(
        [
            random.normal(3, 7, rows)
            if column.kind == "number"
            else random.integers(0, column.num_codes, rows)
            for column in columns
        ],
        axis=1,
    )
    for k, column in enumerate(columns):
        if column.kind == "number" and column.missing:
            table[k : k + 3, k] = np.nan
    return table


@pytest.mark.parametrize("columns", COLUMNS, ids=names)
def test_a_preprocessing_comes_back_from_skops(columns):
    table = table_of(columns, np.random.default_rng(0), 40)
    fitted = fit_preprocessing(table, columns)
    again = from_skops(to_skops(fitted), num_columns=len(columns))
    assert to_features(again, table).tolist() == to_features(fitted, table).tolist()
    assert to_features(again, table).dtype == np.float32


@pytest.mark.parametrize("columns", COLUMNS, ids=names)
@pytest.mark.parametrize("missing", [0, 3])
def test_a_plain_preprocessing_is_the_pipeline_bit_by_bit(columns, missing):
    random = np.random.default_rng(0)
    table = table_of(columns, random, 40)
    fitted = fit_preprocessing(table, columns)
    plain = unpack_plain(pack_plain(to_plain(fitted, columns)), columns)
    rows = table_of(columns, random, 500)
    for k, column in enumerate(columns):
        # What training never saw, in columns where none was missing too.
        rows[random.permutation(500)[:missing], k] = np.nan if column.kind == "number" else -1
    features = plain.transform(rows)
    assert features.tolist() == to_features(fitted, rows).tolist()
    assert features.dtype == np.float32
    assert not np.isnan(features).any()


def test_a_run_without_the_plain_preprocessing_is_read(run):
    new = RunFolder(run)
    (run / PREPROCESSING).unlink()
    values = json.loads((run / RUN).read_text())
    del values["files"][PREPROCESSING]
    (run / RUN).write_text(json.dumps(values))
    old = RunFolder(run)
    assert not old.has(PREPROCESSING)
    rows = table_of(new.description.columns, np.random.default_rng(0), 20)
    features = old.preprocessing().transform(rows)
    assert features.tolist() == to_features(new.pipeline(), rows).tolist()
    of_four = to_skops(
        fit_preprocessing(np.random.default_rng(0).normal(size=(9, 4)), [COMPLETE] * 4)
    )
    replace(run, PIPELINE, of_four)
    message = (
        r"preprocessing\.skops can't be used: 2 columns of numbers and 0 flags make \{'median'"
    )
    with pytest.raises(ArgumentError, match=message):
        RunFolder(run).preprocessing()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "arrays median, flagged, mean, scale are expected, found "),
        (
            {"mean": np.zeros(9)},
            "2 columns of numbers and 1 flags make {'median': 'float64 (2,)', ",
        ),
        ({"median": np.zeros(2, np.float32)}, "2 columns of numbers and 1 flags make {'median': "),
        ({"flagged": np.array([2])}, "flagged is [2], of 2 columns of numbers; train again"),
    ],
)
def test_arrays_that_are_no_preprocessing(run, change, message):
    arrays = safetensors.numpy.load_file(run / PREPROCESSING) | change
    arrays = {name: own for name, own in arrays.items() if own is not None}
    replace(run, PREPROCESSING, safetensors.numpy.save(arrays))
    start = f"{run / PREPROCESSING} can't be used: {message}"
    with pytest.raises(ArgumentError, match=f"^{re.escape(start)}"):
        RunFolder(run).preprocessing()


def test_foreign_types_in_skops_are_refused_before_they_are_made(run, monkeypatch):
    monkeypatch.setattr(skops.io, "loads", pytest.fail)
    replace(run, PIPELINE, skops.io.dumps(FunctionTransformer(np.log)))
    message = (
        r"preprocessing\.skops can't be used: it holds types that unisono never writes: "
        r"numpy\..*, sklearn\.preprocessing\._function_transformer\.FunctionTransformer\.ObjectNode"
    )
    with pytest.raises(ArgumentError, match=message):
        RunFolder(run).pipeline()


def test_a_type_that_is_renamed_in_the_schema_is_refused(run, tmp_path):
    with zipfile.ZipFile(run / PIPELINE) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    schema = parts["schema.json"].replace(b'"StandardScaler"', b'"FunctionTransformer"')
    assert schema != parts["schema.json"]
    with zipfile.ZipFile(tmp_path / "changed", "w") as archive:
        for name, content in (parts | {"schema.json": schema}).items():
            archive.writestr(name, content)
    replace(run, PIPELINE, (tmp_path / "changed").read_bytes())
    message = r"never writes: sklearn\.preprocessing\._data\.FunctionTransformer\.ObjectNode; "
    with pytest.raises(ArgumentError, match=message):
        RunFolder(run).pipeline()


def test_another_transformer_is_not_the_preprocessing(run):
    scaler = StandardScaler().fit(np.ones((3, 2)))
    replace(run, PIPELINE, skops.io.dumps(scaler))
    with pytest.raises(ArgumentError, match=r"can't be used: "):
        RunFolder(run).pipeline()
    table = np.random.default_rng(0).normal(size=(9, 1))
    replace(run, PIPELINE, to_skops(fit_preprocessing(table, [COMPLETE])))
    message = "a ColumnTransformer of 4 columns is expected, found ColumnTransformer of 1; "
    with pytest.raises(ArgumentError, match=re.escape(message)):
        RunFolder(run).pipeline()
