"""Broken files by the hundred: `fuzz` reads them, and these are the files it once stumbled over."""

from __future__ import annotations

import contextlib
import random
import re
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzz
from mutations import OF, change_json
from unisono import CheckpointError, Ensemble
from whole_files import FOLDER, WHOLE, Dtypes, Whole, make_plain

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def check(tally, files):
    assert tally.findings == {}
    assert tally.outcomes["refused"] > files
    assert tally.outcomes["read"] > 0, "some changes change nothing"
    assert tally.peak < 2**30


def test_some_broken_files():
    tally = fuzz.fuzz(0, 0, 60)
    check(tally, 60)
    assert len(tally.messages) > 30, "they are refused for many reasons"


@pytest.mark.slow
def test_many_broken_files():
    check(fuzz.fuzz(1, 0, 10_000), 10_000)


@pytest.mark.parametrize("whole", WHOLE, ids=lambda whole: whole.path)
def test_whole_files_are_read_in_every_way(whole):
    for way, read in fuzz.readers(whole, FOLDER / whole.path).items():
        if way == "from_checkpoints" and whole.is_ensemble:
            with pytest.raises(CheckpointError, match="it is an ensemble of 3 members"):
                read()
        else:
            read()


def test_a_file_of_a_seed_is_always_the_same():
    first, second = (fuzz.make_broken(3, 14) for _ in range(2))
    assert first == second
    assert first != fuzz.make_broken(3, 15)
    whole = FOLDER / first.whole.path
    names = [whole] if whole.is_file() else sorted(whole.iterdir())
    assert first.files != {str(p.relative_to(FOLDER)): p.read_bytes() for p in names}


# What was found once: another error came out, or values that nobody saved, or the process ended.
FOUND = {
    "attribute_items.pt": "a OrderedDict in it has a 'items' that isn't that of its class",
    "integer_with_gradient.safetensors": "`count` required a gradient, which a torch.int64 can't",
    "nested.pt": "`a` is a nested tensor, no plain tensor",
    "no_options.safetensors": "'options' is {}",
    "records_before_the_file.pt": "its directory is not where it says",
    "short_storage.pt": "a tensor in it is larger or smaller than the record that is to hold it",
    "strategy_as_list.safetensors": "strategy is one of 'auto'",
    "tensor_as_name.pt": "a Tensor in it is no name of a tensor",
    "two_directories.pt": "its directory is not where it says",
    "wrong_checksum_of_the_pickle.pt": "`0.bias` is missing",
}


def test_every_file_that_was_found_is_tested():
    assert sorted(path.name for path in (FOLDER / "found").iterdir()) == sorted(FOUND)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once(name):
    make_model = Dtypes if name.startswith("integer") else make_plain
    like = Whole("ensembles/plain.safetensors" if "safetensors" in name else "members/plain.pt",
                 make_model)  # fmt: skip
    for way, read in fuzz.readers(like, FOLDER / "found" / name).items():
        if way in ("load", "load two members", "from_checkpoints behind another"):
            with pytest.raises(CheckpointError, match=re.escape(FOUND[name])):
                read()
        else:
            with contextlib.suppress(CheckpointError):
                read()


@settings(max_examples=150)
@given(content=st.binary(max_size=300), kind=st.sampled_from(sorted(OF)), head=st.booleans())
def test_any_bytes_at_all(tmp_path_factory, content, kind, head):
    """Behind the first bytes of a file of this kind, so that it is taken for one."""
    beginnings = {".safetensors": b"\x40\0\0\0\0\0\0\0{", ".pt": b"PK\3\4", ".json": b"{"}
    path = tmp_path_factory.getbasetemp() / f"any{kind}"
    if kind == ".json":
        path = path.with_name("any.index.json")
    path.write_bytes((beginnings.get(kind, b"\x80\2") if head else b"") + content)
    with pytest.raises((CheckpointError, OSError)):
        Ensemble.from_checkpoints(make_plain, [path])
    with pytest.raises((CheckpointError, OSError)):
        Ensemble.load(path, make_plain)


def test_a_changed_json_value_is_another():
    value = {"a": [1, {"b": "text"}], "c": None}
    changed = [change_json(value, random.Random(k)) for k in range(200)]
    assert value == {"a": [1, {"b": "text"}], "c": None}, "the original stays"
    assert sum(one != value for one in changed) > 150


# The fuzzer itself --------------------------------------------------------------------------------


FAULTY = """
import os, sys, time
first = int(sys.argv[sys.argv.index("--first") + 1])
files = int(sys.argv[sys.argv.index("--files") + 1])
for number in range(first, first + files):
    print("begin", number, flush=True)
    if number == 1: os.abort()
    if number == 2: time.sleep(100)
    if number == 3: time.sleep(0.3 if files > 1 else 0)
    print("finding" if number == 4 else "refused", "`a` is 3", flush=True)
    print("peak", 200 if number == 5 else 50, flush=True)
    if number == 5: break
"""


def test_what_ends_a_child_is_told_and_the_rest_is_read(tmp_path, monkeypatch):
    program = tmp_path / "faulty.py"
    program.write_text(FAULTY)
    monkeypatch.setattr(fuzz, "__file__", str(program))
    tally = fuzz.fuzz(0, 0, 8, seconds=0.25, room=100)
    assert tally.findings == {
        1: "the process ended with -6",
        2: "it hangs: more than 1.5 s",
        4: "`a` is 3",
        5: "memory: 0 MiB",
    }, "3 was only slow among others"
    assert tally.outcomes == {"refused": 5, "finding": 1}
    assert tally.peak == 200


def other_values(path, make_model, **options):
    ens = LOAD(path, make_model, **options)
    with torch.no_grad():
        next(ens.parameters()).view(-1)[0] += 1
    return ens


def out_of_range(*_, **__):
    raise IndexError("out of range")


LOAD = Ensemble.load


@pytest.mark.parametrize(("fault", "told"), [
    (out_of_range, "IndexError: out of range"),
    (other_values, "other values, silently: \\['members.0.weight'\\]"),
])  # fmt: skip
def test_errors_and_other_values_are_findings(tmp_path, monkeypatch, fault, told):
    whole = WHOLE[0]
    files = {whole.path: (FOLDER / whole.path).read_bytes()}
    broken = fuzz.Broken(whole, files, is_forged=False)
    assert {outcome for outcome, _ in fuzz.read_broken(broken, tmp_path)} == {"read", "refused"}
    calls = iter([fault, LOAD, LOAD, LOAD])
    monkeypatch.setattr(Ensemble, "load", lambda *a, **k: next(calls)(*a, **k))
    outcome, text = next(fuzz.read_broken(broken, tmp_path))
    assert outcome == "finding"
    assert re.search(told, text)
