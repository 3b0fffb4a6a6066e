"""Results are whole or absent."""

import errno
import os

import pytest

from unisono.commands.files import OutputFolder
from unisono.commands.outcome import ArgumentError, CommandError


def test_all_files_are_written(tmp_path):
    with OutputFolder(tmp_path / "a" / "b") as out:
        paths = out.write({"x": b"one", "y": b"two"})
    assert [path.read_bytes() for path in paths] == [b"one", b"two"]
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["x", "y"]


def test_without_a_file_the_new_folders_are_removed(tmp_path):
    with OutputFolder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path) == []


def test_an_older_folder_stays(tmp_path):
    (tmp_path / "a").mkdir()
    with OutputFolder(tmp_path / "a" / "b"):
        pass
    assert os.listdir(tmp_path) == ["a"]


def test_a_new_folder_stays_if_someone_else_uses_it(tmp_path):
    with OutputFolder(tmp_path / "a"):
        (tmp_path / "a" / "theirs").write_text("theirs")
    assert os.listdir(tmp_path / "a") == ["theirs"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_in_the_block_removes_the_new_folder(tmp_path, error):
    with pytest.raises(error), OutputFolder(tmp_path / "a"):
        raise error
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_files_whole(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old")
    with OutputFolder(tmp_path) as out:
        calls = []

        def full_at_the_second_file(_):
            calls.append(None)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full_at_the_second_file)
        with pytest.raises(CommandError, match=r"^can't write to .*: No space left on device$"):
            out.write({"x": b"new", "y": b"new"})
        assert not out.written
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_that_refuses_is_found_before_the_work(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "fsync", refuse)  # file modes don't stop root, who may run the tests
    with (
        pytest.raises(ArgumentError, match=r"^can't write to --out .*: Permission denied$"),
        OutputFolder(tmp_path / "a" / "b"),
    ):
        raise AssertionError("the block must not run")
    assert os.listdir(tmp_path) == []
