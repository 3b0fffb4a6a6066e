"""Hostile files of `torch.save`: no code of theirs is run, and they are one clear error."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch._tensor import _rebuild_from_type_v2
from torch._utils import _rebuild_meta_tensor_no_storage, _rebuild_tensor_v2

from hostile import OF_MEMBER, gather, inspect, refused, written
from unisono import CheckpointError
from unisono.checkpoint.member_file import open_member
from whole_files import FOLDER, Dtypes, make_plain

pytestmark = pytest.mark.usefixtures("in_time")


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
    "TorchScript": (script, "it is a program of TorchScript, which holds code; if you trust it"),
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
PLAIN = (STORAGE, 0, (4,), (1,), False, OrderedDict())
WITH_DETACH = (_rebuild_tensor_v2, torch.Tensor, PLAIN, {"detach": 5})
STATES = {
    "no dict": (lambda: [1, 2], "it holds a list, not a state dict"),
    "a tensor": (lambda: torch.zeros(3), "it holds a Tensor, not a state dict"),
    "itself": (itself, "'state' in it is no tensor"),
    "an attribute in place of a method": (
        WithAttribute,
        "a OrderedDict in it has a 'items' that isn't that of its class",
    ),
    "an attribute in place of another method": (
        lambda: {"a": Evil(_rebuild_from_type_v2, *WITH_DETACH)},
        "a Tensor in it has a 'detach' that isn't that of its class",
    ),
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
    shifted = 0
    for padding in range(1, 5):
        path = written(tmp_path, "f.pt", zipped({"f/" + "x" * padding: b"", **records}))
        mapped = torch.load(path, mmap=True)["complexes"]
        shifted += mapped.data_ptr() % 16 != 0
        with open_member(path) as found:
            for name, tensor in state.items():
                assert found[name].data_ptr() % tensor.dtype.itemsize == 0
                assert found[name].stride() == tensor.stride()
                bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor)]
                assert torch.equal(*bits), name
    assert shifted
