"""Tensors and facts in one file: what is written comes back, and anything else is told."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from forging import forged, taken_apart
from unisono import CheckpointError
from unisono.checkpoint import reading
from unisono.checkpoint.dtypes import CODES
from unisono.checkpoint.reading import open_file, read
from unisono.checkpoint.writing import MAX_HEADER, write

AS_BYTES = [torch.complex128, torch.float8_e8m0fnu]
DTYPES = [*CODES, *AS_BYTES]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def example(dtype, *shape):
    """Any bits at all; booleans have only two values."""
    size = max(1, dtype.itemsize)
    count = torch.Size(shape).numel() * size
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 2), (3, 0), (1,)], ids=str)
def test_every_dtype_comes_back_bitwise(tmp_path, dtype, shape):
    tensor = example(dtype, *shape)
    stacked = ["x"] if shape else []
    write(tmp_path / "f", {"x": tensor}, "facts", stacked=stacked)
    with open_file(tmp_path / "f", what="it") as file:
        back = file.read("x")
        rows = dict(file.read_stacked(None, lambda _: torch.device("cpu")))
    for found in (back, *rows.values()):
        assert found.dtype == dtype
        assert found.shape == tensor.shape
        assert torch.equal(bits(found), bits(tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_dtype(tmp_path, dtype):
    tensor = example(dtype, 5, 3)
    write(tmp_path / "f", {"x": tensor}, "facts", stacked=["x"])
    with open_file(tmp_path / "f", what="it") as file:
        rows = dict(file.read_stacked([4, 0, 0], lambda _: torch.device("cpu")))
    assert torch.equal(bits(rows["x"]), torch.cat([bits(tensor[i]) for i in (4, 0, 0)]))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(3, 5, 4).mT,
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.empty_strided((2, 1, 3), (3, 1, 1)).fill_(1),
        torch.tensor(3.0),
        torch.zeros(0, 2),
        torch.tensor([True, False]),
        torch.randn(3).bfloat16(),
        torch.randn(3, 2, dtype=torch.complex128).mT,
    ],
)
def test_tensors_come_back_in_their_order(tmp_path, tensor):
    write(tmp_path / "f", {"x": tensor}, {"a": [1, None]})
    tensors, facts = read(tmp_path / "f", what="it")
    assert torch.equal(tensors["x"], tensor)
    assert tensors["x"].stride() == tensor.stride()
    assert tensors["x"].dtype == tensor.dtype
    assert facts == {"a": [1, None]}


def test_what_isn_t_dense_comes_back_in_order(tmp_path):
    tensor = torch.randn(4, 6)[:, ::2]
    write(tmp_path / "f", {"x": tensor, "y": torch.ones(1).expand(3), "z": tensor.conj()}, "facts")
    tensors, _ = read(tmp_path / "f", what="it")
    assert torch.equal(tensors["x"], tensor)
    assert torch.equal(tensors["y"], torch.ones(3))
    assert tensors["x"].stride() == (3, 1)


def test_conjugated_and_negated_views(tmp_path):
    tensor = torch.randn(3, dtype=torch.complex64)
    write(tmp_path / "f", {"conj": tensor.conj(), "imag": tensor.conj().imag}, "facts")
    tensors, _ = read(tmp_path / "f", what="it")
    assert torch.equal(tensors["conj"], tensor.conj().resolve_conj())
    assert torch.equal(tensors["imag"], -tensor.imag)


def test_other_programs_read_the_tensors(tmp_path):
    tensors = {"w": torch.randn(3, 4, 2).mT, "n": torch.arange(3), "c": torch.randn(2).double()}
    write(tmp_path / "f", tensors, "facts", stacked=["w", "n"])
    found = load_file(tmp_path / "f")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_large_rows_are_read_in_pieces(tmp_path):
    tensor = torch.randn(7, 2**19)  # 2 MiB a row: threads of two rows each
    write(tmp_path / "f", {"x": tensor}, "facts", stacked=["x"])
    with open_file(tmp_path / "f", what="it") as file:
        all_rows = dict(file.read_stacked(None, lambda _: torch.device("cpu")))
        some = dict(file.read_stacked([6, 1, 2, 3, 0], lambda _: torch.device("cpu")))
    assert torch.equal(all_rows["x"], tensor)
    assert torch.equal(some["x"], tensor[[6, 1, 2, 3, 0]])


# What is wrong with a file ------------------------------------------------------------------------


def damaged(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_told_with_tensor_or_member(tmp_path):
    path = tmp_path / "f"
    write(path, {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)}, "facts", stacked=["a", "b"])
    damaged(path, -1)  # the last row of `b`
    with open_file(path, what="it") as file:
        with pytest.raises(CheckpointError, match="the values of `b` are not those that were"):
            list(file.read_stacked(None, lambda _: torch.device("cpu")))
        with pytest.raises(CheckpointError, match=r"the values of members \[2\] are not those"):
            list(file.read_stacked([0, 2], lambda _: torch.device("cpu")))
        rows = dict(file.read_stacked([0, 1], lambda _: torch.device("cpu")))
    assert rows["b"].shape == (2, 4)


def test_a_flipped_bit_of_a_tensor_without_members(tmp_path):
    path = tmp_path / "f"
    write(path, {"a": torch.zeros(3)}, "facts")
    damaged(path, -1)
    with pytest.raises(CheckpointError, match=f"{path} isn't it: the values of `a` are not those"):
        read(path, what="it")


def test_every_byte_of_a_file_counts(tmp_path):
    """Wherever a bit of a small file is flipped, it is told, or the content is the same."""
    path, whole = tmp_path / "f", {"a": torch.arange(4.0), "b": torch.zeros(2, 1)}
    write(path, whole, {"k": "v"}, stacked=["b"])
    content = path.read_bytes()
    unnoticed = []
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        try:
            tensors, facts = read(path, what="it")
        except CheckpointError:
            continue
        unnoticed.append(at)
        assert facts == {"k": "v"}
        assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    # The key and the value of `format`, which only others look at.
    assert len(unnoticed) <= len("formatpt"), [content[at : at + 1] for at in unnoticed]


def test_tensors_may_begin_anywhere(tmp_path):
    path = tmp_path / "f"
    entries = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "C64", "shape": [2], "data_offsets": [1, 17]},
        "c": {"dtype": "U8", "shape": [1, 16], "data_offsets": [17, 33]},
    }
    notes = {"facts": 1, "stacked": [], "strides": {}, "dtypes": {"c": "complex128"}}
    notes["checks"] = {"tensors": {"a": "0", "b": "0", "c": "0"}, "members": ""}
    path.write_bytes(forged(entries, notes, bytes(33)))
    with open_file(path, what="it") as file:
        assert file.map("b").data_ptr() % 8 == 0
        assert torch.equal(file.map("b"), torch.zeros(2, dtype=torch.complex64))
        assert torch.equal(file.map("c"), torch.zeros(1, dtype=torch.complex128))


@pytest.mark.parametrize("size", [0, 1, 7, 8, 40, 500, -1])
def test_a_file_that_was_cut_off(tmp_path, size):
    path = tmp_path / "f"
    write(path, {"a": torch.zeros(100)}, {"k": "v"})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{path} isn't it: "):
        read(path, what="it")


def test_a_huge_header_is_not_read(tmp_path):
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.write((2**30).to_bytes(8, "little"))
        file.truncate(2**31)
    with pytest.raises(CheckpointError, match="its header has 1,073,741,824 bytes, the largest"):
        read(path, what="it")


def test_facts_too_long_to_be_read_are_not_written(tmp_path):
    path = tmp_path / "f"
    write(path, {}, "before")
    with pytest.raises(ValueError, match=r"names and facts take .* bytes, a file has"):
        write(path, {}, "x" * MAX_HEADER)
    assert read(path, what="it") == ({}, "before")
    assert list(tmp_path.iterdir()) == [path]


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match="it is a folder; name a file in it"):
        read(tmp_path, what="it")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing", what="it")


def test_a_file_of_someone_else(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "f")
    with pytest.raises(CheckpointError, match="isn't it: it holds no facts of unisono"):
        read(tmp_path / "f", what="it")


FORGERIES = {
    "strides that overlap": (
        lambda notes: notes["strides"].update(x=[0, 1]),
        r"shape \(2, 2\) can't have the strides \[0, 1\]",
    ),
    "too few strides": (
        lambda notes: notes["strides"].update(x=[1]),
        r"shape \(2, 2\) can't have the strides \[1\]",
    ),
    "strides of no tensor": (lambda notes: notes["strides"].update(y=[1]), "it has no 'y'"),
    "strides that are no numbers": (lambda notes: notes["strides"].update(x="ab"), "invalid lit"),
    "an unknown dtype": (lambda notes: notes["dtypes"].update(x="int3"), "'int3' is no dtype"),
    "other bytes": (lambda notes: notes["dtypes"].update(x="complex128"), "stored as bytes, 16"),
    "no checksums": (lambda notes: notes.pop("checks"), "it has no 'checks'"),
    "checksums of others": (lambda notes: notes["checks"].update(tensors={}), "it has no 'x'"),
    "members of no length": (
        lambda notes: notes["checks"].update(members="00"),
        "buffer size must be a multiple",
    ),
    "other members": (
        lambda notes: notes["checks"].update(members="0000000000000000ffffffff"),
        r"`x` of shape \(2, 2\) is stacked, of 3 members",
    ),
    "nothing": (lambda notes: notes.clear(), "it has no 'facts'"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_notes(tmp_path, name):
    path = tmp_path / "f"
    write(path, {"x": torch.zeros(2, 2)}, "facts", stacked=["x"])
    entries, notes, data = taken_apart(path.read_bytes())
    path.write_bytes(forged(entries, notes, data))
    assert torch.equal(read(path, what="it")[0]["x"], torch.zeros(2, 2))  # the forger's tools work

    change, message = FORGERIES[name]
    change(notes)
    path.write_bytes(forged(entries, notes, data))
    with pytest.raises(CheckpointError, match=message):
        read(path, what="it")


@pytest.mark.parametrize("text", ["[" * 100_000, "nul", "1e999999", '{"facts": ' + "9" * 5000])
def test_forged_text(tmp_path, text):
    path = tmp_path / "f"
    entries = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    path.write_bytes(forged(entries, text, b"\0" * 4))
    with pytest.raises(CheckpointError, match=f"{path} isn't it"):
        read(path, what="it")


# What can't be written ----------------------------------------------------------------------------


def test_tensors_that_cannot_be_stored_are_listed(tmp_path):
    path = tmp_path / "f"
    tensors = {
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.empty(2, device="meta"),
        "bits": torch.empty(2, dtype=torch.bits8),
    }
    with pytest.raises(TypeError, match="can't be saved") as caught:
        write(path, tensors, "facts")
    assert str(caught.value) == (
        "can't be saved: `sparse` is a torch.sparse_coo tensor; convert it with .to_dense();"
        " `meta` is on the meta device and has no values; `bits`: tensors of dtype"
        " torch.bits8 can't be stored"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "missing" / "f"
    with pytest.raises(FileNotFoundError) as caught:
        write(path, {}, "facts")
    assert caught.value.filename == str(path)


def test_rows_are_read_by_themselves(tmp_path, monkeypatch):
    """Through a map, the system would bring megabytes around each of them from the disk."""
    tensors = {"a": torch.randn(40, 300), "b": torch.randn(40, 2, 5).mT, "c": torch.zeros(40, 0)}
    write(tmp_path / "f", tensors, "facts", stacked=tensors)
    taken = []

    def spy(handle, buffers, at):
        taken.append(sum(len(buffer) for buffer in buffers))
        return preadv(handle, buffers, at)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", spy)
    with open_file(tmp_path / "f", what="it") as file:
        rows = dict(file.read_stacked([7, 39], lambda _: torch.device("cpu")))
    assert all(torch.equal(rows[name], tensors[name][[7, 39]]) for name in tensors)
    assert sum(taken) == 2 * (300 + 10) * 4


def test_where_the_system_reads_no_rows_the_map_does(tmp_path, monkeypatch):
    write(tmp_path / "f", {"a": torch.arange(12.0).view(4, 3)}, "facts", stacked=["a"])
    monkeypatch.delattr(os, "preadv")
    with open_file(tmp_path / "f", what="it") as file:
        rows = dict(file.read_stacked([3, 1], lambda _: torch.device("cpu")))
    assert torch.equal(rows["a"], torch.arange(12.0).view(4, 3)[[3, 1]])


@pytest.mark.parametrize("members", [None, [3, 0]])
def test_a_file_that_another_replaces_is_read_to_its_end(tmp_path, members):
    write(tmp_path / "f", {"a": torch.zeros(4, 3)}, "facts", stacked=["a"])
    with open_file(tmp_path / "f", what="it") as file:
        write(tmp_path / "f", {"a": torch.ones(4, 3)}, "facts", stacked=["a"])
        rows = dict(file.read_stacked(members, lambda _: torch.device("cpu")))
    assert not rows["a"].any()


def test_a_file_that_another_replaces_while_it_is_opened(tmp_path, monkeypatch):
    """The library opens it twice; here another file comes between the first time."""
    write(tmp_path / "f", {"a": torch.zeros(4, 3)}, "facts", stacked=["a"])
    times = []

    def replaced(path, **options):
        times.append(path)
        handle = safe_open(path, **options)
        if len(times) == 1:
            write(tmp_path / "f", {"a": torch.ones(4, 3)}, "facts", stacked=["a"])
        return handle

    monkeypatch.setattr(reading, "safe_open", replaced)
    tensors, _ = read(tmp_path / "f", what="it")
    assert tensors["a"].all()
    assert len(times) == 2
