"""Every model of the table, exported in every way, against the members one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import CASES
from exports import (
    BATCH_AXES,
    BY_NAME,
    NOT_ONNX,
    NOT_PACKAGED,
    NOT_TRACED,
    batches_of,
    exported_case,
    loop,
    tensors_of,
)
from unisono import export
from unisono.errors import ExportError

onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*forward assigns the attribute:unisono.EnsembleWarning"),
    pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning"),
    # torch's own, when a program runs or is loaded
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
]
QUICK = ("mlp", "cnn-batchnorm")
NAMES = [
    pytest.param(param.id, marks=() if param.id in QUICK else pytest.mark.slow) for param in CASES
]
SLOW = [pytest.param(param.id, marks=pytest.mark.slow) for param in CASES]


def test_every_exception_is_a_case() -> None:
    for table in (BATCH_AXES, NOT_TRACED, NOT_ONNX, NOT_PACKAGED):
        assert table.keys() <= BY_NAME.keys()


@pytest.mark.parametrize("name", NAMES)
def test_program(name: str) -> None:
    ens, args, kwargs = exported_case(name)
    if name in NOT_TRACED:
        with pytest.raises(ExportError, match=f"(?s)export.program: .*{NOT_TRACED[name]}"):
            export.program(ens, args, kwargs, batch_axes=BATCH_AXES.get(name, 0))
        return
    program = export.program(ens, args, kwargs, batch_axes=BATCH_AXES.get(name, 0))
    own = {f"members.{key}" for key, _ in ens.members.named_parameters(remove_duplicate=False)}
    assert own <= program.state_dict.keys() <= ens.state_dict().keys()
    module = program.module()
    for some_args, some_kwargs in batches_of(name, args, kwargs):
        got = tensors_of(module(*some_args, **some_kwargs))
        assert_close(got, loop(ens, some_args, some_kwargs))


@pytest.mark.parametrize("name", NAMES)
def test_onnx(name: str, tmp_path: Path) -> None:
    ens, args, kwargs = exported_case(name, torch.float32)
    path, axes = tmp_path / "ens.onnx", BATCH_AXES.get(name, 0)
    if name in NOT_ONNX:
        with pytest.raises(ExportError, match=f"(?s)export.onnx: .*{NOT_ONNX[name]}"):
            export.onnx(ens, args, path, kwargs=kwargs, batch_axes=axes)
        assert not list(tmp_path.iterdir())
        return
    written = export.onnx(ens, args, path, kwargs=kwargs, batch_axes=axes)
    assert list(tmp_path.iterdir()) == [path]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    for some_args, some_kwargs in batches_of(name, args, kwargs):
        tensors = tensors_of((some_args, some_kwargs))
        feed = {
            port.name: tensor.numpy()
            for port, tensor in zip(written.inputs, tensors, strict=True)
            if port.name in known
        }
        found = session.run([port.name for port in written.outputs], feed)
        assert_close(list(map(torch.as_tensor, found)), loop(ens, some_args, some_kwargs))


@pytest.mark.compile
@pytest.mark.parametrize("name", SLOW)
def test_package(name: str, tmp_path: Path) -> None:
    ens, args, kwargs = exported_case(name)
    path, axes = tmp_path / "ens.pt2", BATCH_AXES.get(name, 0)
    if name in NOT_PACKAGED:
        with pytest.raises(ExportError, match=f"(?s)export.package: .*{NOT_PACKAGED[name]}"):
            export.package(ens, args, path, kwargs=kwargs, batch_axes=axes)
        assert not list(tmp_path.iterdir())
        return
    export.package(ens, args, path, kwargs=kwargs, batch_axes=axes)
    loaded = torch._inductor.aoti_load_package(str(path))
    for some_args, some_kwargs in batches_of(name, args, kwargs):
        got = tensors_of(loaded(*some_args, **some_kwargs))
        assert_close(got, loop(ens, some_args, some_kwargs))


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for k, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        rough: dict[str, Any] = {}
        if theirs.dtype == torch.float32:  # other kernels: relative to the largest of a tensor
            finite = theirs[theirs.isfinite()]
            largest = float(finite.abs().max()) if finite.numel() else 0.0
            rough = {"rtol": 0.0, "atol": 1e-5 * max(1.0, largest)}
        elif theirs.dtype in (torch.float16, torch.bfloat16):
            rough = {"rtol": 2e-2, "atol": 2e-2}
        torch.testing.assert_close(
            mine.detach(), theirs, equal_nan=True, msg=lambda m, k=k: f"output {k}: {m}", **rough
        )
