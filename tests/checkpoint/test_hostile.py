"""Broken and hostile files: each is one clear error that names it, and nothing else happens."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import signal
import struct
import tarfile
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._utils import _rebuild_meta_tensor_no_storage, _rebuild_tensor_v2

from forging import forged, taken_apart
from unisono import CheckpointError, Ensemble
from unisono.checkpoint.reading import open_file
from unisono.checkpoint.writing import MAX_HEADER, write
from unisono.commands.inspect import run_inspect
from unisono.commands.outcome import ArgumentError
from whole_files import FOLDER, Dtypes, Tied, make_plain

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


@pytest.fixture(autouse=True)
def _in_time():
    """A file that is waited for, or read without end, is an error, and the next test runs."""

    def late(*_):
        raise TimeoutError("still reading after 20 s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


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


# Files of ensembles -------------------------------------------------------------------------------


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


CONTENT = ENSEMBLE.read_bytes()
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


def test_members_without_tensors_of_their_own_are_not_without_number(tmp_path):
    Ensemble.build(lambda: nn.Linear(2, 2), 2, shared="*").save(tmp_path / "f")
    entries, notes, data = taken_apart((tmp_path / "f").read_bytes())
    notes["facts"]["members"] = 10**12
    (tmp_path / "f").write_bytes(forged(entries, notes, data))
    message = "an ensemble has 1 to 2,097,152 members, found 1,000,000,000,000"
    refused(load, tmp_path / "f", message, make_model=lambda: nn.Linear(2, 2))


# Pickles ------------------------------------------------------------------------------------------


class Evil:
    """Would make a file if it were unpickled as Python does it."""

    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


def save_zip(value, path):
    torch.save(value, path)


def save_legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_bare(value, path):
    path.write_bytes(pickle.dumps(value, protocol=2))


def save_tar(value, path):
    """The format of torch before 0.1.10."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(value, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


NOT_RUN = r"GLOBAL \S+ was not an allowed|GLOBAL \S+ whose module \S+ is blocked|legacy .tar"


@pytest.mark.parametrize("read", [*OF_MEMBER, inspect])
@pytest.mark.parametrize("save", [save_zip, save_legacy, save_bare, save_tar])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_code_in_a_pickle_is_not_run(tmp_path, read, save, suffix):
    canary = tmp_path / "canary"
    for evil in (
        Evil(os.system, f"touch {canary}"),
        Evil(eval, f"open({str(canary)!r}, 'w')"),
        OrderedDict(a=torch.zeros(2), b=Evil(open, str(canary), "w")),
    ):
        path = tmp_path / f"f{suffix}"
        save(evil, path)
        refused(read, path, NOT_RUN)
        assert not canary.exists()
    pickle.loads(pickle.dumps(evil))["b"].close()
    assert canary.exists(), "Python itself runs it"


def test_code_in_a_shard_is_not_run(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"0.weight": Evil(os.system, f"touch {canary}")}, tmp_path / "x.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": "x.bin"}}))
    with pytest.raises(CheckpointError, match=NOT_RUN):
        gather(tmp_path)
    assert not canary.exists()


def whole_records():
    with zipfile.ZipFile(FOLDER / "members/plain.pt") as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(records, method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return out.getvalue()


def bomb():
    """A record of 128 MB in a file of 0.1 MB."""
    return zipped({**whole_records(), "plain/data/0": bytes(2**27)}, zipfile.ZIP_DEFLATED)


def two_directories():
    """What stands where one reader looks for the directory is not what another reader finds."""
    content = zipped(whole_records())
    end = len(content) - 22
    count, size, start = struct.unpack_from("<H2L", content, end + 10)
    directory = content[start : start + size]
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, start, 0)
    return content[:end] + directory.replace(b"plain", b"plajn") + last


def overlapping():
    """A hundred names for the same bytes."""
    content = zipped({"plain/data.pkl": b"x" * 10_000})
    end = len(content) - 22
    size, start = struct.unpack_from("<2L", content, end + 12)
    entry = content[start : start + size]
    entries = b"".join(entry.replace(b"data.pkl", b"data/%03d" % k) for k in range(100))
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 100, 100, len(entries), start, 0)
    return content[:start] + entries + last


def script():
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), out)
    return out.getvalue()


def without(*names):
    return zipped({k: v for k, v in whole_records().items() if not k.endswith(names)})


WHOLE_ZIP = (FOLDER / "members/plain.pt").read_bytes()
ZIPS = {
    "empty": (lambda: b"", "Ran out of input|EOF|cut off"),
    "cut off": (lambda: WHOLE_ZIP[:-30], "it was cut off, or has something behind its end"),
    "longer": (lambda: WHOLE_ZIP + b"x", "it was cut off, or has something behind its end"),
    "a bomb": (bomb, r"is compressed, \d[\d,]* bytes unpacked; torch.save stores plain bytes"),
    "two directories": (two_directories, "its directory is not where it says"),
    "overlapping": (overlapping, "its records have 1,000,000 bytes together, the file has"),
    "TorchScript": (script, "TorchScript archives|is compressed"),
    "no pickle": (lambda: without("data.pkl"), "data.pkl"),
    "no storage": (lambda: without("data/0"), "data/0"),
    "a short storage": (
        lambda: zipped({**whole_records(), "plain/data/0": b"1234"}),
        "a tensor in it is larger or smaller than the record that is to hold it",
    ),
    "other bytes": (lambda: b"PK\3\4" + bytes(100), "it was cut off"),
    "text": (lambda: b"weights = 1\n" * 50, "isn't the checkpoint of a model"),
}


@pytest.mark.parametrize("read", OF_MEMBER)
@pytest.mark.parametrize("name", ZIPS)
def test_zip_files_that_torch_save_did_not_write(tmp_path, read, name):
    content, message = ZIPS[name]
    refused(read, written(tmp_path, "f.pt", content()), message)


def with_item(call):
    state = OrderedDict(make_plain().state_dict())
    call(state)
    return state


def rebuilt(*arguments):
    return Evil(_rebuild_tensor_v2, *arguments)


def itself():
    state = {}
    state["state"] = state
    return state


class WithAttribute:
    """Unpickled a dict whose `items` is no method."""

    def __reduce__(self):
        return OrderedDict, (), {"items": 5}, None, iter([("a", 1)])


STORAGE = torch.zeros(4)._typed_storage()
STATES = {
    "no dict": (lambda: [1, 2], "it holds a list, not a state dict"),
    "a tensor": (lambda: torch.zeros(3), "it holds a Tensor, not a state dict"),
    "itself": (itself, "'state' in it is no tensor"),
    "an attribute in place of a method": (WithAttribute, "'a' in it is no tensor"),
    "a name that is none": (lambda: {(1, 2): torch.zeros(1)}, "a tuple in it is no name of a t"),
    "a tensor as a name": (lambda: {torch.zeros(1): torch.zeros(1)}, "a Tensor in it is no name"),
    "nested": (
        lambda: {"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])},
        "`a` is a nested tensor, no plain tensor",
    ),
    "meta": (
        lambda: {"a": Evil(_rebuild_meta_tensor_no_storage, torch.float32, (2,), (1,), False)},
        "`a` is a tensor without values, no plain tensor",
    ),
    "sparse": (
        lambda: with_item(lambda s: s.update({"0.weight": torch.eye(4, 3).to_sparse()})),
        "`0.weight` is a torch.sparse_coo tensor, only dense ones can be stacked",
    ),
    "more than its storage": (
        lambda: {"a": rebuilt(STORAGE, 0, (10**6,), (1,), False, OrderedDict())},
        "storage",
    ),
    "a huge view": (
        lambda: with_item(lambda s: s.update(
            {"0.bias": rebuilt(STORAGE, 0, (10**9, 10**9), (0, 0), False, OrderedDict())}
        )),
        r"`0.bias` has shape \(1000000000, 1000000000\), the model's has \(4,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("read", OF_MEMBER)
@pytest.mark.parametrize("name", STATES)
def test_what_no_state_dict_holds(tmp_path, read, name):
    make, message = STATES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        save_zip(make(), tmp_path / "f.pt")
    refused(read, tmp_path / "f.pt", message)


def test_complex_numbers_between_addresses(tmp_path):
    """Kernels of torch end the process there."""
    state = Dtypes().state_dict()
    torch.save(state, tmp_path / "f.pt")
    with zipfile.ZipFile(tmp_path / "f.pt") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    for padding in range(1, 5):
        shifted = {"f/" + "x" * padding: b"", **records}
        path = written(tmp_path, "f.pt", zipped(shifted))
        ens = Ensemble.from_checkpoints(Dtypes, [path])
        for name, tensor in state.items():
            bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in
                    (ens.state_dict()[f"members.{name}"][0], tensor)]  # fmt: skip
            assert torch.equal(*bits), name


# Indexes of shards --------------------------------------------------------------------------------

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


EVERY = [*OF_ENSEMBLE, *OF_MEMBER, inspect]


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
