"""`export.package`: a file that runs without the class, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from exports import SimpleMLP
from unisono import Ensemble, export, per_member
from unisono.errors import ExportError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
]
LOADS = """
    import sys
    import torch
    package, inputs, outputs = sys.argv[1:]
    torch.save(torch._inductor.aoti_load_package(package)(torch.load(inputs)), outputs)
    assert "unisono" not in sys.modules and "exports" not in sys.modules
"""


@pytest.mark.slow
@pytest.mark.compile
def test_it_runs_in_a_process_without_the_class(tmp_path: Path) -> None:
    ens = Ensemble([SimpleMLP() for _ in range(10)]).eval()
    x = torch.randn(64, 784)
    path = tmp_path / "ens.pt2"
    written = export.package(ens, x, path)
    assert str(written.inputs[0]) == "x: float32 (batch, 784)"
    assert str(written.outputs[0]) == "outputs: float32 (10, batch, 10)"
    assert written.num_bytes == path.stat().st_size
    assert "AOTInductor, cpu" in str(written)
    torch.save(x[:7], tmp_path / "x.pt")
    script = [sys.executable, "-I", "-c", textwrap.dedent(LOADS)]
    subprocess.run([*script, path, tmp_path / "x.pt", tmp_path / "y.pt"], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), ens(x[:7]).detach())


@pytest.mark.slow
@pytest.mark.compile
def test_combinations_and_marked_inputs(tmp_path: Path) -> None:
    ens = Ensemble([nn.Linear(3, 4) for _ in range(3)]).eval()
    ens.combination.set(weights=[1, 2, 3])
    xs = torch.randn(3, 5, 3)
    path = tmp_path / "ens.pt2"
    written = export.package(ens, per_member(xs), path, combination="uncertainty")
    assert written.outputs[0].name == "prediction"
    loaded = torch._inductor.aoti_load_package(str(path))
    want = ens.combination.probabilities(ens(per_member(xs))).detach()
    torch.testing.assert_close(loaded(xs)["prediction"], want)


@pytest.mark.slow
@pytest.mark.compile
def test_what_differs_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "ens.pt2"
    path.write_text("old")
    ens = Ensemble([nn.Linear(3, 4) for _ in range(3)]).eval()
    with pytest.raises(ExportError, match=r"export.package: what was exported computes something"):
        export.package(ens, torch.ones(5, 3), path, tolerance=-1.0)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_train_mode_and_other_names_are_refused(tmp_path: Path) -> None:
    ens = Ensemble([nn.Linear(3, 4) for _ in range(3)])
    with pytest.raises(ExportError, match=r"export.package: the ensemble is in train mode"):
        export.package(ens, torch.ones(5, 3), tmp_path / "ens.pt2")
    with pytest.raises(ValueError, match=r"export.package: the file is a .pt2 file; got 'ens.so'"):
        export.package(ens.eval(), torch.ones(5, 3), tmp_path / "ens.so")


def test_without_a_compiler_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("No working C++ compiler found. More")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    ens = Ensemble([nn.Linear(3, 4) for _ in range(3)]).eval()
    with pytest.raises(
        ExportError,
        match=r"export.package: AOTInductor can't compile this: RuntimeError: No working C\+\+"
        r" compiler found. It needs a C\+\+ compiler, as g\+\+ on a CPU; export.onnx and",
    ):
        export.package(ens, torch.ones(5, 3), tmp_path / "ens.pt2")
    assert not list(tmp_path.iterdir())
