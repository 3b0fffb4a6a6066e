"""The walk in docs/command-line.md, as it is printed there: two .pt files to ONNX and back."""

import shlex
import sys
from pathlib import Path

import pytest
import torch

from markdown_blocks import find_blocks
from unisono.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
HEADING = "## From checkpoints to ONNX and back\n"


def test_five_documented_commands(capsys, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    section = PAGE.read_text(encoding="utf-8").partition(HEADING)[2].partition("\n## ")[0]
    python, console = find_blocks(section)
    assert (python.language, console.language) == ("python", "console")
    exec(compile(python.source, str(PAGE), "exec"), {})
    lines = console.source.splitlines()
    assert len(lines) == 5
    for line in lines:
        prompt, program, *arguments = shlex.split(line)
        assert (prompt, program) == ("$", "unisono")
        code = main(arguments)
        out, err = capsys.readouterr()
        assert (code, err) == (0, ""), line
        assert out
    for i, name in enumerate("ab"):
        before = torch.load(f"{name}.pt", weights_only=True)
        after = torch.load(f"members/member_{i}.pt", weights_only=True)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    del sys.modules["nets"]
