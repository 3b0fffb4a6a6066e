"""Plans that are kept for the next process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import unisono
from unisono import CheckpointError, Ensemble, EnsembleWarning
from unisono.engine.planning import measuring


@pytest.fixture(autouse=True)
def no_plans_of_other_tests() -> Iterator[None]:
    unisono.plans.clear()
    yield
    unisono.plans.clear()


def make() -> Ensemble:
    return Ensemble([nn.Sequential(nn.Linear(4, 3), nn.ReLU()) for _ in range(4)])


X = torch.zeros(8, 4)


def test_a_loaded_plan_is_used_and_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plans.json"
    made = make().explain(X)
    assert unisono.plans.save(file) == 1
    unisono.plans.clear()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(measuring, "measure", refuse)
    assert unisono.plans.load(file) == 1
    found = make().explain(X)
    assert (found.strategy, found.chunk_size, found.candidates) == (
        made.strategy, made.chunk_size, made.candidates
    )  # fmt: skip
    assert found.memory_format == made.memory_format


CODE = """
import torch, unisono, sys
from torch import nn
from unisono.engine.planning import measuring
ens = unisono.Ensemble([nn.Sequential(nn.Linear(4, 3), nn.ReLU()) for _ in range(4)])
def loss(member, x):
    return member(x).square().mean()
if sys.argv[2] == "load":
    assert unisono.plans.load(sys.argv[1]) == 2
    measuring.measure = None
for fn in (lambda: ens(torch.zeros(8, 4)), lambda: ens.run(loss, torch.zeros(8, 4))):
    fn()
if sys.argv[2] == "save":
    assert unisono.plans.save(sys.argv[1]) == 2
print(ens.explain(torch.zeros(8, 4)).strategy)
"""


def test_another_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(unisono.__file__).parents[1])}
    printed = [
        subprocess.run(
            [sys.executable, "-c", CODE, str(tmp_path / "plans.json"), what],
            env=environment, check=True, capture_output=True, text=True, timeout=120,
        ).stdout
        for what in ("save", "load")
    ]  # fmt: skip
    assert printed[0] == printed[1]


def test_plans_of_another_machine_are_not_taken_over(tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    make()(X)
    unisono.plans.save(file)
    content = json.loads(file.read_text())
    content["machine"]["threads"] = "64"
    file.write_text(json.dumps(content))
    unisono.plans.clear()
    with pytest.warns(EnsembleWarning, match=r"was measured elsewhere \(threads 64 instead of"):
        assert unisono.plans.load(file) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": 2, "machine": {}, "plans": {}}',
        '{"format": 1, "machine": {}}',
        '{"format": 1, "machine": {}, "plans": {"a": {"strategy": "fast"}}}',
        '{"format": 1, "machine": {}, "plans": {"a": 3}}',
        '{"format": 1, "machine": {}, "plans": []}',
        "[" * 100_000,
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plans.json"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=r"plans\.json isn't a file of plans: "):
        unisono.plans.load(file)


def test_binary_content_is_the_same_error(tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    file.write_bytes(b"\xff\x00\x80")
    with pytest.raises(CheckpointError, match="isn't a file of plans"):
        unisono.plans.load(file)


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, "2", True])
def test_a_chunk_size_that_is_none(tmp_path: Path, chunk_size: object) -> None:
    file = tmp_path / "plans.json"
    make()(X)
    unisono.plans.save(file)
    content = json.loads(file.read_text())
    next(iter(content["plans"].values()))["chunk_size"] = chunk_size
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="chunk_size is"):
        unisono.plans.load(file)


def test_a_failed_save_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "plans.json"
    file.write_text("before")

    def fails(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="disk full"):
        unisono.plans.save(file)
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_file_is_torchs_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        unisono.plans.load(tmp_path / "nothing.json")
