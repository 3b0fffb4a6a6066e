"""Scripts and the command line under `torchrun`: what one process does, from the same line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from launch import PATHS, ROOT, run_ranks
from markdown_blocks import find_blocks

pytestmark = pytest.mark.distributed

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """The README's training script: its blocks up to the one with `fit`."""
    blocks = [b.source for b in find_blocks((ROOT / "README.md").read_text()) if b.skip is None]
    blocks = blocks[: 1 + next(k for k, source in enumerate(blocks) if "fit(" in source)]
    script = tmp_path_factory.mktemp("readme") / "train.py"
    script.write_text("\n".join(blocks))
    return script


@pytest.mark.parametrize(
    ("dtype", "atol"),
    [("float64", 1e-10), pytest.param("float32", 1e-5, marks=pytest.mark.slow)],
)
def test_readme_script_equals_one_process(readme, dtype, atol, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    subprocess.run(
        [sys.executable, ROOT / "tests" / "distributed" / "script.py", readme, dtype],
        env={**ENVIRONMENT, "RESULTS": str(one)},
        check=True,
        timeout=100,
    )
    wanted = json.loads((one / "0").read_text())
    for found in run_ranks("script", str(readme), dtype, ranks=2, folder=two):
        assert largest_difference(found, wanted) <= atol


def largest_difference(found, wanted):
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        return max((largest_difference(found[k], wanted[k]) for k in wanted), default=0.0)
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        pairs = zip(found, wanted, strict=True)
        return max((largest_difference(a, b) for a, b in pairs), default=0.0)
    if isinstance(wanted, str) or wanted is None:
        assert found == wanted
        return 0.0
    return abs(found - wanted)


@pytest.mark.slow
def test_saved_on_four_ranks_and_resumed_on_one_two_three_and_seven(tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    run_ranks("resumed", "interrupt", str(saved), ranks=4, folder=tmp_path)
    (wanted,) = run_ranks("resumed", "whole", str(saved), ranks=1, folder=tmp_path)
    for ranks in (1, 2, 3, 7):
        copy = tmp_path / str(ranks + 10)
        shutil.copytree(saved, copy)
        for found in run_ranks("resumed", "resume", str(copy), ranks=ranks, folder=tmp_path):
            assert largest_difference(found, wanted) <= 1e-10


@pytest.mark.slow
def test_command_line_writes_and_prints_once(tmp_path):
    pytest.importorskip("sklearn")
    line = ["-m", "unisono", "train", "--data", "digits", "--members", "3", "--epochs", "2"]
    runs = {}
    for name, start in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]),
    ):
        done = subprocess.run(
            [sys.executable, *start, *line, "--out", str(tmp_path / name), "--checkpoint-every=1"],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        runs[name] = done
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        assert "metrics.json" in files
        assert not [file for file in files if file.endswith(".tmp")]
    for text in ("trained in", "wrote"):
        assert runs["two"].stdout.count(text) == runs["one"].stdout.count(text) > 0
    assert runs["two"].stderr.count("epoch 2/2") == runs["one"].stderr.count("epoch 2/2") == 1
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in runs]
    assert largest_difference(*metrics) < 1e-4
