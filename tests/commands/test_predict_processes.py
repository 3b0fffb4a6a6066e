"""`unisono predict --launch` and under `torchrun`: real processes, killed and resumed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from small_tables import cancer_frame
from unisono.commands.finished import STATE
from unisono.commands.launching import launch
from unisono.commands.outcome import CommandError
from unisono.commands.predict import PredictRequest, run_predict

pytestmark = pytest.mark.distributed

SOURCE = Path(__file__).parents[2] / "src"
SECONDS = 300  # a machine may be busy


def write_tables(folder, files, rows):
    """Files of real rows in random order, each row with a number of its own."""
    folder.mkdir()
    frame = cancer_frame()
    random_rows = np.random.default_rng(0)
    for k in range(files):
        own = frame.iloc[random_rows.integers(0, len(frame), rows)]
        own = own.assign(key=np.arange(k * rows, (k + 1) * rows))
        own.to_parquet(folder / f"part-{k:03}.parquet", row_group_size=rows // 2, index=False)
    return folder


def start(run, source, output, *options, launcher=("unisono.cli",)):
    """The command in a process group of its own."""
    command = [sys.executable, "-m", *launcher, "predict", str(run), "--input", str(source)]
    return subprocess.Popen(
        [*command, "--output", str(output), "--keep", "key", "--device", "cpu", *options],
        env=os.environ | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, err[-5000:]
    return out


def records(output):
    return len([path for path in (output / STATE).rglob("*.json") if path.name != "job.json"])


def kill_when(process, condition, wait=0.0):
    """`SIGKILL` to all of its processes, some seconds after; says whether they were at work."""
    end = time.monotonic() + SECONDS
    while process.poll() is None and not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(wait)
    was_on = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return was_on


def alive(group):
    """The commands of a process group; those that only nobody has waited for are dead."""
    command = ["ps", "-eo", "pgid=,stat=,args="]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    lines = [line.split(None, 2) for line in found]
    return [line[2] for line in lines if line[0] == str(group) and not line[1].startswith("Z")]


def contents(output):
    return {path.name: path.read_bytes() for path in output.glob("*.parquet")}


def uninterrupted(run, source, output):
    """By this process; one that was stopped is taken up."""
    return run_predict(
        PredictRequest(run, str(source), str(output), ("key",), device="cpu"), Console(quiet=True)
    )


def test_two_processes_killed_and_taken_up_by_one(cancer_run, tmp_path):
    source = write_tables(tmp_path / "in", files=3, rows=20_000)
    uninterrupted(cancer_run, source, tmp_path / "whole")
    output = tmp_path / "killed"
    process = start(cancer_run, source, output, "--launch", "2")
    assert kill_when(process, lambda: records(output))
    report = uninterrupted(cancer_run, source, output)
    assert report.rows < 60_000
    assert contents(output) == contents(tmp_path / "whole")
    assert not list(output.rglob("*.tmp"))


@pytest.mark.slow
def test_200_files_killed_three_times(cancer_run, tmp_path):
    source = write_tables(tmp_path / "in", files=200, rows=4_000)
    finish(start(cancer_run, source, tmp_path / "whole", "--launch", "2"))
    output, moments = tmp_path / "killed", random.Random(0)
    for share in (0.1, 0.4, 0.7):
        process = start(cancer_run, source, output, "--launch", "2")
        least = moments.randint(int(200 * share), int(200 * share) + 40)
        wait = moments.uniform(0, 0.1)  # anywhere in a piece
        assert kill_when(process, lambda least=least: records(output) >= least, wait)
        assert least <= records(output) < 200
    out = finish(start(cancer_run, source, output, "--launch", "2"))
    assert "rows of" in out.splitlines()[0]
    assert len(contents(output)) == 200
    assert contents(output) == contents(tmp_path / "whole")
    keys = pd.concat(pd.read_parquet(path) for path in sorted(output.glob("*.parquet")))["key"]
    assert keys.tolist() == list(range(800_000))
    assert not list(output.rglob("*.tmp"))


@pytest.mark.slow
def test_a_large_file_is_shared_out_and_outlives_a_killed_worker(cancer_run, tmp_path):
    table = pq.read_table(write_tables(tmp_path / "rows", 1, 2_000_000) / "part-000.parquet")
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "large.parquet", row_group_size=100_000)
    output = tmp_path / "out"
    process = start(cancer_run, tmp_path / "in" / "large.parquet", output, "--launch", "2")
    parts = output / STATE / "large.parquet.parts"
    while process.poll() is None and not list(parts.glob("*.json")):
        time.sleep(0.01)
    command = ["pgrep", "-P", str(process.pid), "-f", "spawn_main"]
    worker = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    os.kill(int(worker), signal.SIGKILL)
    lines = finish(process).splitlines()
    assert "the processes were started anew once, because one of them was killed" in lines
    keys = pd.read_parquet(output / "large.parquet")["key"]
    assert keys.tolist() == list(range(2_000_000))
    assert not parts.exists()


@pytest.mark.slow
def test_torchrun(cancer_run, tmp_path):
    source = write_tables(tmp_path / "in", files=5, rows=1_000)
    uninterrupted(cancer_run, source, tmp_path / "whole")
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    process = start(cancer_run, source, tmp_path / "out", launcher=(*launcher, "unisono.cli"))
    lines = finish(process).splitlines()
    assert [line for line in lines if line.startswith("predicted 5,000 rows")]
    assert len([line for line in lines if line.startswith("wrote ")]) == 1  # rank 0 alone
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False], ids=["terminal", "one-process"])
def test_ctrl_c_ends_all_processes(cancer_run, tmp_path, to_all):
    source = write_tables(tmp_path / "in", files=20, rows=50_000)
    output = tmp_path / "out"
    process = start(cancer_run, source, output, "--launch", "2")
    while process.poll() is None and not records(output):
        time.sleep(0.01)
    if to_all:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    message = "interrupted; what is finished is kept, and the same command goes on from there"
    assert (out, err) == ("", f"unisono predict: {message}\n")
    end = time.monotonic() + 10
    while (left := alive(process.pid)) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == []
    uninterrupted(cancer_run, source, output)
    assert len(contents(output)) == 20


@pytest.mark.slow
def test_a_bad_file_is_one_line(cancer_run, tmp_path):
    source = write_tables(tmp_path / "in", files=2, rows=100)
    (source / "junk.parquet").write_text("junk")
    process = start(cancer_run, source, tmp_path / "out", "--launch", "2")
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1)
    start_of_line = "unisono predict: 1 of 3 files can't be predicted, the others are finished: "
    assert err.startswith(f"{start_of_line}{source / 'junk.parquet'} isn't a Parquet file")
    assert sorted(contents(tmp_path / "out")) == ["part-000.parquet", "part-001.parquet"]


@pytest.mark.slow
def test_what_the_launcher_gives_back():
    assert launch(abs, -3, 2) == [3, 3]
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match=r"(?s)^process . of 1 ended with 1:.*ValueError: inval"):
        launch(int, "no number", 1)
    with pytest.raises(CommandError, match=r"^process 0 of 1 was ended by SIGKILL, after 3 times "):
        launch(_kill_self, signal.SIGKILL, 1)
    assert signal.getsignal(signal.SIGINT) is handler


_kill_self = signal.raise_signal  # importable by the new process, unlike what a test module holds
