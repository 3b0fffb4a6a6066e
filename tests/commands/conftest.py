"""Settings of the tests of the commands, and runs that several of them read."""

import pytest
import torch
from rich.console import Console

from small_tables import cancer_frame, diabetes_frame
from unisono.commands.train import TrainRequest, run_train
from unisono.commands.train_table import TableRequest, run_train_table

QUICK = {"members": 3, "epochs": 3, "device": "cpu", "patience": 0}


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small only wait for each other's threads, the longer the busier the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tables(tmp_path_factory):
    """A folder with cancer.csv, cancer.parquet, diabetes.csv and diabetes.parquet."""
    folder = tmp_path_factory.mktemp("tables")
    for name, frame in (("cancer", cancer_frame()), ("diabetes", diabetes_frame())):
        frame.to_csv(folder / f"{name}.csv", index=False)
        frame.to_parquet(folder / f"{name}.parquet", index=False)
    return folder


@pytest.fixture(scope="session")
def cancer_run(tables):
    """The folder of a classification."""
    return _train(tables, "cancer.csv", "kind", "classification")


@pytest.fixture(scope="session")
def diabetes_run(tables):
    """The folder of a regression."""
    return _train(tables, "diabetes.csv", "target", "regression")


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory):
    """The folder of a run on images; copy it before you change it."""
    out = tmp_path_factory.mktemp("images") / "run"
    request = TrainRequest("digits", "cnn", members=2, epochs=1, batch_size=512, out=out)
    run_train(request, Console(quiet=True))
    return out


def _train(tables, name, target, task):
    out = tables / "runs" / name
    request = TableRequest(tables / name, target, task, out=out, **QUICK)
    run_train_table(request, Console(quiet=True))
    return out
