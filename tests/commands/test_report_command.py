"""`unisono report`: where the page goes; what is in it, the tests of the report say."""

import errno
import os
import re

import pytest

from unisono.cli import main
from unisono.commands.outcome import ArgumentError, CommandError
from unisono.commands.report import run_report


@pytest.mark.parametrize("fixture", ["cancer_run", "diabetes_run"])
def test_the_page_of_a_table(request, fixture, tmp_path):
    run = request.getfixturevalue(fixture)
    path = run_report(run, tmp_path / "page.html")
    assert path == tmp_path / "page.html"
    assert path.read_text(encoding="utf-8").lower().startswith("<!doctype html>")


def test_it_is_written_into_the_folder(capsys, cancer_run):
    assert main(["report", str(cancer_run)]) == 0
    path = cancer_run / "report.html"
    assert capsys.readouterr().out == f"wrote {path}\n"
    path.unlink()


def test_what_cannot_be(capsys, tmp_path, cancer_run):
    for out, message in (
        (tmp_path, f"--out {tmp_path} is a folder; give a file"),
        (
            tmp_path / "none" / "page.html",
            f"--out {tmp_path / 'none' / 'page.html'}: there is no folder {tmp_path / 'none'}",
        ),
    ):
        with pytest.raises(ArgumentError, match=f"^{re.escape(message)}$"):
            run_report(cancer_run, out)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"unisono report: {tmp_path} has no run.json, so it isn't a run that unisono train "
        "finished\n"
    )
    assert main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == (
        f"unisono report: {tmp_path / 'none'} doesn't exist; give the folder that unisono train "
        "wrote\n"
    )
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_page(cancer_run, tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CommandError, match=r"^can't write to .*: No space left on device$"):
        run_report(cancer_run, page)
    assert page.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]
