"""Ways to read a file that is broken or hostile, and what has to come of it."""

from __future__ import annotations

import pytest
import torch

from unisono import CheckpointError, Ensemble
from unisono.commands.inspect import run_inspect
from unisono.commands.outcome import ArgumentError
from whole_files import FOLDER, make_plain

ENSEMBLE = FOLDER / "ensembles" / "plain.safetensors"
REFUSED = (CheckpointError, OSError, ArgumentError)


def load(path, make_model=make_plain):
    return Ensemble.load(path, make_model)


def load_two(path, make_model=make_plain):
    return Ensemble.load(path, make_model, members=[2, 0])


def gather(path, make_model=make_plain):
    return Ensemble.from_checkpoints(make_model, [path])


def gather_behind_another(path, make_model=make_plain):
    return Ensemble.from_checkpoints(make_model, [FOLDER / "members/plain.pt", path])


def inspect(path):
    return run_inspect(path)


OF_ENSEMBLE = [load, load_two]
OF_MEMBER = [gather, gather_behind_another]
EVERY = [*OF_ENSEMBLE, *OF_MEMBER, inspect]
CONTENT = ENSEMBLE.read_bytes()


def refused(read, path, message, **models):
    """The text of the error; there is one, and no trace of the attempt."""
    folder = path.parent
    listing, state = sorted(folder.iterdir()), torch.get_rng_state()
    with pytest.raises(REFUSED, match=message) as caught:
        read(path, **models)
    assert not isinstance(caught.value, TimeoutError)
    assert path.name in str(caught.value)
    assert len(str(caught.value)) < 3000
    assert sorted(folder.iterdir()) == listing
    assert torch.equal(torch.get_rng_state(), state)
    return str(caught.value)


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content)
    return path
