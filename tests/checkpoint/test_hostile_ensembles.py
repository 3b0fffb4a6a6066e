"""Broken and forged files of ensembles: each is one clear error, and nothing else happens."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from forging import forged, taken_apart
from hostile import CONTENT, ENSEMBLE, OF_ENSEMBLE, inspect, load, load_two, refused, written
from unisono import CheckpointError, Ensemble
from unisono.checkpoint.reading import open_file
from unisono.checkpoint.writing import MAX_HEADER, write
from whole_files import FOLDER, Dtypes, Tied, make_plain

pytestmark = pytest.mark.usefixtures("in_time")


def changed_header(change):
    """The ensemble after ``change(entries, notes)``, its checksums made to agree."""
    entries, notes, data = taken_apart(ENSEMBLE.read_bytes())
    change(entries, notes)
    return forged(entries, notes, data)


def set_in(notes, *path, to):
    for key in path[:-1]:
        notes = notes[key]
    notes[path[-1]] = to


def other_shape(entries, _):
    entries["members.0.weight"]["shape"] = [3, 3, 4]


def other_dtype(entries, _):
    entries["members.0.weight"]["dtype"] = "I32"


def another_name(entries, notes):
    entries["members.0.heavy"] = entries.pop("members.0.weight")
    notes["stacked"] = ["members.0.heavy", *(n for n in notes["stacked"] if "0.weight" not in n)]
    checks = notes["checks"]["tensors"]
    checks["members.0.heavy"] = checks.pop("members.0.weight")


LENGTH = int.from_bytes(CONTENT[:8], "little")
HEADERS = {
    "empty": (b"", "Error while deserializing header: header too small"),
    "cut off in its header": (CONTENT[:500], "or it was cut off after 500 bytes"),
    "cut off in its tensors": (CONTENT[:-5], "incomplete metadata, file not fully covered"),
    "longer than it says": (CONTENT + b"x", "incomplete metadata, file not fully covered"),
    "a huge header": (
        (MAX_HEADER + 1).to_bytes(8, "little") + b" " * (MAX_HEADER + 1),
        "its header has 16,777,217 bytes, the largest that is read has 16,777,216",
    ),
    "a header longer than the file": (b"\xff" * 7 + b"\0" + CONTENT[8:], "no safetensors file"),
    "deep JSON": (
        (90_000).to_bytes(8, "little") + b'{"a":' * 15_000 + b"1" + b"}" * 15_000,
        "Error while deserializing header",
    ),
    "a bit of the header": (
        CONTENT.replace(b"plain attributes", b"plain_attributes").replace(
            b"torch.nn.modules.linear", b"torch.nn.modules.linfar", 1
        ),
        "its header is not the one that was saved",
    ),
    "a zip file": ((FOLDER / "members/plain.pt").read_bytes(), "no safetensors file begins like"),
    "a pickle": (pickle.dumps(list(range(100))), "no safetensors file begins like this"),
    "another version": (
        changed_header(lambda _, notes: set_in(notes, "facts", "version", to=2)),
        "it has version 2 of the format, this unisono reads 1; it was written by {'unisono'",
    ),
    "another shape": (
        changed_header(other_shape),
        r"`0.weight` has shape \(3, 4\) in the file, \(4, 3\) in the model",
    ),
    "another dtype": (
        changed_header(other_dtype),
        "`0.weight` is torch.int32 in the file, torch.float32 in the model",
    ),
    "another name": (
        changed_header(another_name),
        "`0.heavy` is in the file, and not in the model\n  `0.weight` is in the model, and not in",
    ),
    "options of no strategy": (
        changed_header(lambda _, n: set_in(n, "facts", "options", "strategy", to=["fused"])),
        r"strategy is one of 'auto'.*; got \['fused'\]",
    ),
    "a size of no chunk": (
        changed_header(lambda _, n: set_in(n, "facts", "options", "chunk_size", to=-1)),
        "chunk_size is a positive integer.*; got -1",
    ),
    "strides that reach far": (
        changed_header(lambda _, n: set_in(n, "strides", "members.1.weight", to=[1, 10**30])),
        "can't have the strides",
    ),
}


@pytest.mark.parametrize("read", OF_ENSEMBLE)
@pytest.mark.parametrize("name", HEADERS)
def test_broken_ensembles(tmp_path, read, name):
    content, message = HEADERS[name]
    refused(read, written(tmp_path, "f.safetensors", content), message)


def test_a_flipped_bit_names_the_tensor_or_the_member(tmp_path):
    entries, _, data = taken_apart(CONTENT)
    for key in sorted(entries):
        start, end = entries[key]["data_offsets"]
        at = len(CONTENT) - len(data) + end - 1
        flipped = CONTENT[:at] + bytes([CONTENT[at] ^ 1]) + CONTENT[at + 1 :]
        path = written(tmp_path, "f.safetensors", flipped)
        assert end > start
        refused(load, path, f"the values of `{key}` are not those that were saved")
        if key.startswith("members."):
            refused(load_two, path, r"the values of members \[2\] are not those that were saved")


# Field -> what can't stand there. The rest of the file is whole, and its checksums agree.
FACTS = {
    "kind": [None, "training", 5, "x" * 5000],
    "version": [None, 0, 2, "1", [1], {"a": "x" * 5000}],
    "members": [None, 0, -1, 2, 4, 10**30, "3", 3.0, True],
    "shared": [None, "x", [1], ["nope"], ["0.weight"]],
    "ties": [None, [], {"a": 1}, {"0.weight": "nope"}, {"x": "0.weight"}, {"0.bias": "2.bias"}],
    "frozen": [None, {}, [1]],
    "buffers": [None, {}, [1]],
    "non_persistent": [None, {}, [None]],
    "evaluating": [None, "", [[]]],
    "options": [None, {}, [], {"strategy": "auto"}, {"a": 1, "b": 2, "c": 3}],
    "outline": [None, [], {"0": "x"}, {"0": {"p": 1}}, {"0": {"class": "torch.nn.ReLU"}}],
    "versions": [None, [], {"torch": 1}],
}


@pytest.mark.parametrize("read", [*OF_ENSEMBLE, inspect])
@pytest.mark.parametrize("field", FACTS)
def test_forged_facts(tmp_path, read, field):
    assert FACTS.keys() == taken_apart(CONTENT)[1]["facts"].keys()
    for value in FACTS[field]:
        if read is inspect and field in ("ties", "outline", "kind"):
            continue  # what needs a model to be found, or is another kind of file
        content = changed_header(lambda _, notes, v=value: set_in(notes, "facts", field, to=v))
        refused(read, written(tmp_path, "f.safetensors", content), "f.safetensors")
    content = changed_header(lambda _, notes: notes["facts"].pop(field))
    if read is not inspect or field != "kind":
        refused(read, written(tmp_path, "f.safetensors", content), "f.safetensors")


@pytest.mark.parametrize("make_model", [Tied, Dtypes, lambda: nn.Linear(3, 4)])
def test_another_architecture(make_model):
    refused(load, ENSEMBLE, "was saved from another architecture", make_model=make_model)


def test_an_attribute_of_another_value():
    def make_model():
        model = make_plain()
        model[1].momentum = 0.3
        return model

    refused(load, ENSEMBLE, "`1`: momentum was 0.1, now 0.3", make_model=make_model)


def test_an_integer_parameter_that_required_a_gradient(tmp_path):
    content = (FOLDER / "ensembles/dtypes.safetensors").read_bytes()
    entries, notes, data = taken_apart(content)
    notes["facts"]["frozen"].remove("count")
    path = written(tmp_path, "f", forged(entries, notes, data))
    message = "`count` required a gradient, which a torch.int64 can't have"
    refused(load, path, message, make_model=Dtypes)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("weights", [0.5, float("nan"), 0.5], "weights: finite and not negative, got nan"),
    ("weights", [0.5, -1.0, 0.5], "weights: finite and not negative, got -1.0"),
    ("weights", [0.0, 0.0, 0.0], "weights: all 3 are zero"),
    ("weights", [0.5, 0.5], r"`combination.weights` of shape \(2,\), torch.float32 is unexpected"),
    ("weights", [1, 2, 3], r"`combination.weights` of shape \(3,\), torch.int64 is unexpected"),
    ("temperatures", [1.0, 0.0, 1.0], "temperatures: finite and above zero, got 0.0"),
    ("temperatures", 1.0, r"`combination.temperatures` of shape \(\), torch.float32 is unexp"),
    ("pooled_temperature", float("inf"), "pooled_temperature: finite and above zero, got inf"),
    ("heat", [1.0, 1.0, 1.0], r"`combination.heat` of shape \(3,\), torch.float32 is unexpected"),
])  # fmt: skip
@pytest.mark.parametrize("read", OF_ENSEMBLE)
def test_combinations_that_could_not_have_been_set(tmp_path, read, name, value, message):
    with open_file(ENSEMBLE, what="it") as file:
        tensors = {key: file.read(key) for key in file.entries if "combination" not in key}
        tensors[f"combination.{name}"] = torch.tensor(value)
        write(tmp_path / "f", tensors, file.facts, stacked=file.stacked)
    refused(read, tmp_path / "f", message)


def test_a_combination_that_could_not_be_loaded_is_not_saved(tmp_path):
    ens = Ensemble([make_plain() for _ in range(3)])
    ens.combination.set(weights=[1, 1, 1])
    ens.combination.weights[1] = float("nan")
    with pytest.raises(ValueError, match=r"ens.save: ens.combination .* weights: finite and not"):
        ens.save(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_strides_of_one_row_take_no_memory_for_several(tmp_path):
    """A row may have any stride. Read twice, it would be that far away from itself."""
    write(tmp_path / "f", {"x": torch.ones(1, 3)}, "facts", stacked=["x"])
    entries, notes, data = taken_apart((tmp_path / "f").read_bytes())
    notes["strides"]["x"] = [10**12, 1]
    (tmp_path / "f").write_bytes(forged(entries, notes, data))
    with open_file(tmp_path / "f", what="it") as file:
        rows = dict(file.read_stacked([0, 0], lambda _: torch.device("cpu")))
    assert rows["x"].untyped_storage().nbytes() == 2 * 3 * 4
    assert torch.equal(rows["x"], torch.ones(2, 3))


@pytest.mark.parametrize("stride", [10**30, -1, 2**63])
def test_strides_that_are_none(tmp_path, stride):
    write(tmp_path / "f", {"x": torch.ones(1, 3)}, "facts", stacked=["x"])
    entries, notes, data = taken_apart((tmp_path / "f").read_bytes())
    notes["strides"]["x"] = [stride, 1]
    (tmp_path / "f").write_bytes(forged(entries, notes, data))
    message = rf"shape \(1, 3\) can't have the strides \[{stride}, 1\]"
    with pytest.raises(CheckpointError, match=message), open_file(tmp_path / "f", what="it") as f:
        f.read("x")


def test_members_without_tensors_of_their_own_are_not_without_number(tmp_path):
    Ensemble.build(lambda: nn.Linear(2, 2), 2, shared="*").save(tmp_path / "f")
    entries, notes, data = taken_apart((tmp_path / "f").read_bytes())
    notes["facts"]["members"] = 10**12
    (tmp_path / "f").write_bytes(forged(entries, notes, data))
    message = "an ensemble has 1 to 2,097,152 members, found 1,000,000,000,000"
    refused(load, tmp_path / "f", message, make_model=lambda: nn.Linear(2, 2))
