"""Indexes that lead elsewhere, pipes, devices and locked files: each is one clear error."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from hostile import (
    CONTENT,
    ENSEMBLE,
    EVERY,
    OF_ENSEMBLE,
    OF_MEMBER,
    gather,
    inspect,
    load,
    refused,
    written,
)
from unisono import CheckpointError
from unisono.checkpoint.writing import MAX_HEADER
from whole_files import FOLDER

pytestmark = pytest.mark.usefixtures("in_time")

PLACES = ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "", ".."]
PLACES += ["x\0.safetensors", "x\n.safetensors", "\ud800.safetensors", "./x.safetensors"]


@pytest.mark.parametrize("place", PLACES)
def test_indexes_that_lead_elsewhere(tmp_path, place):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": place}}))
    message = "`0.weight` is said to be in .*, which is no file name; shards lie in the folder of"
    refused(gather, index, message)
    with pytest.raises(CheckpointError, match=message):
        gather(tmp_path)


@pytest.mark.parametrize(("text", "message"), [
    ("", "isn't the index of a checkpoint: JSONDecodeError"),
    ("{", "isn't the index of a checkpoint: JSONDecodeError"),
    ("[1]", "isn't the index of a checkpoint: TypeError"),
    ("{}", "isn't the index of a checkpoint: KeyError: 'weight_map'"),
    ('{"weight_map": 3}', "isn't the index of a checkpoint: AttributeError"),
    ('{"weight_map": {"a": ["x"]}}', r"`a` is said to be in \['x'\], which is no file name"),
    ("[" * 100_000, "isn't the index of a checkpoint: RecursionError"),
    ('{"weight_map": {"a": "model.safetensors.index.json"}}', "its name ends in '.json'"),
    ("\xff", "isn't the index of a checkpoint: "),
    (" " * (MAX_HEADER + 1), "an index of 16,777,217 bytes isn't read"),
])  # fmt: skip
def test_indexes_that_are_none(tmp_path, text, message):
    path = written(tmp_path, "model.safetensors.index.json", text.encode("latin-1"))
    refused(gather, path, message)


def test_shards_that_are_missing_or_something_else(tmp_path):
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": "x.bin"}}))
    with pytest.raises(FileNotFoundError, match=r"x.bin"):
        gather(tmp_path)
    for value in ([1], 5, torch.zeros(2), None):
        torch.save(value, tmp_path / "x.bin")
        with pytest.raises(CheckpointError, match=r"x.bin isn't .*: it holds a \w+, not a state"):
            gather(tmp_path)
    torch.save({}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"x.bin has no `0.weight`, which pytorch_model.bin"):
        gather(tmp_path)


# What is no file ----------------------------------------------------------------------------------


def suffixes(read):
    return [".safetensors"] if read in OF_ENSEMBLE else [".safetensors", ".pt", ".index.json"]


@pytest.mark.parametrize("read", EVERY)
def test_a_pipe_that_nobody_writes_to(tmp_path, read):
    for suffix in suffixes(read):
        os.mkfifo(tmp_path / f"f{suffix}")
        refused(read, tmp_path / f"f{suffix}", "it is a pipe or a device, not a file")


@pytest.mark.parametrize("read", EVERY)
@pytest.mark.parametrize("device", ["zero", "full", "null", "urandom"])
def test_devices(tmp_path, read, device):
    for suffix in suffixes(read):
        (tmp_path / f"f{suffix}").symlink_to(f"/dev/{device}")
        refused(read, tmp_path / f"f{suffix}", "it is a pipe or a device, not a file")


@pytest.mark.parametrize("read", EVERY)
def test_a_folder_and_a_missing_file(tmp_path, read):
    for suffix in suffixes(read):
        (tmp_path / f"d{suffix}").mkdir()
        refused(read, tmp_path / f"d{suffix}", "folder")
        refused(read, tmp_path / f"missing{suffix}", "No such file|doesn't exist|there is no")


@pytest.fixture
def locked():
    """A file that this user may not read."""
    folder = Path(tempfile.mkdtemp())
    path = written(folder, "f.safetensors", CONTENT)
    path.chmod(0)
    folder.chmod(0o755)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything, nobody may not
    yield path
    os.seteuid(user)
    shutil.rmtree(folder)


@pytest.mark.parametrize("read", EVERY)
def test_a_file_that_may_not_be_read(locked, read):
    refused(read, locked, "Permission denied")


def test_a_header_of_very_many_tensors_is_read_in_time(tmp_path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    entries = {f"{k:x}": entry for k in range(20_000)}
    header = json.dumps(entries, separators=(",", ":")).encode()
    assert len(header) < MAX_HEADER
    path = written(tmp_path, "f.safetensors", len(header).to_bytes(8, "little") + header)
    refused(gather, path, "`0.weight` is missing")
    refused(load, path, "nothing that says how many members they are of")


def test_the_files_before_they_were_broken():
    for read in (*OF_ENSEMBLE, inspect):
        read(ENSEMBLE)
    for path in ("members/plain.pt", "members/legacy.pth", "sharded", "sharded_bin"):
        for read in (*OF_MEMBER, inspect):
            read(FOLDER / path)
    assert copy.deepcopy(load(ENSEMBLE)).combination.weights.tolist() == [0.5, 0.25, 0.25]
