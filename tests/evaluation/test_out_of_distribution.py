"""The benchmark of digits that were never seen runs, and writes what it prints."""

import json

import pytest

from benchmarks import out_of_distribution


def test_the_benchmark(tmp_path, capsys):
    pytest.importorskip("mlxtend", reason="needs unisono[demo]")
    file = tmp_path / "new" / "found.json"
    assert out_of_distribution.main(["--tiny", "--members", "2", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "64 test images of them against 64 of 8 to 9" in printed
    found = json.loads(file.read_text())["models"]
    assert list(found) == ["MLP", "CNN"]
    for (row,) in found.values():
        assert len(row["members"]) == 2
        assert f"{row['epistemic']:.3f}" in printed
