"""`export.onnx`: names, weights, combinations, the report, and what happens when it fails."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exports import SimpleMLP, exported_case
from unisono import Ensemble, MissingExtraError, combine, export, per_member, uncertainty
from unisono.engine.planning.storage import adopt
from unisono.errors import ExportError
from unisono.export import onnx_file, onnx_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

X = torch.linspace(-1, 1, 15).view(5, 3)


def linear_ensemble(n: int = 3, classes: int = 4) -> Ensemble:
    torch.manual_seed(1)
    return Ensemble([nn.Linear(3, classes) for _ in range(n)]).eval()


def run(path: Path, **inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.as_tensor(each) for each in found]


def floats_in(path: Path) -> int:
    """How many floats are stored in a file."""
    arrays = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
    return sum(array.size for array in arrays if array.dtype == np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ens.onnx"


def test_the_graph_of_the_tutorial_holds_each_layer_once(path: Path) -> None:
    torch.manual_seed(0)
    ens = Ensemble([SimpleMLP() for _ in range(10)]).eval()
    x = torch.randn(64, 1, 28, 28)
    written = export.onnx(ens, x, path)
    assert written.ops == Counter(
        {"Gemm": 1, "MatMul": 2, "Add": 2, "Relu": 2, "Reshape": 3, "Transpose": 2}
    )
    assert floats_in(path) == sum(parameter.numel() for parameter in ens.parameters())
    assert written.difference.absolute <= 1e-5
    for size in (1, 64, 100):
        x = torch.randn(size, 1, 28, 28)
        (found,) = run(path, x=x)
        torch.testing.assert_close(found, ens(x).detach(), rtol=0, atol=1e-5)


OTHERS = ("mlp", "two-paths", "frozen", "conv-depthwise", "embedding-padding-index")


@pytest.mark.parametrize(
    "name", ["tied", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_each_weight_is_stored_once(name: str, path: Path) -> None:
    ens, args, kwargs = exported_case(name, torch.float32)
    export.onnx(ens, args, path, kwargs=kwargs)
    assert floats_in(path) == sum(parameter.numel() for parameter in ens.parameters())


@pytest.mark.slow
def test_a_shared_part_is_stored_and_computed_once(path: Path) -> None:
    trunk = nn.Linear(3, 5)
    models = [nn.Sequential(trunk, nn.ReLU(), nn.Linear(5, 2)) for _ in range(4)]
    ens = Ensemble(models, shared="0.*").eval()
    written = export.onnx(ens, X, path)
    assert floats_in(path) == sum(parameter.numel() for parameter in ens.parameters())
    assert written.ops["Gemm"] == 2
    assert "MatMul" not in written.ops


def convolutional() -> nn.Module:
    convolutions = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(80, 2))


@pytest.mark.slow
@pytest.mark.parametrize("memory_format", ["channels_last", "transposed"])
def test_the_order_of_the_weights_in_memory_is_no_matter(memory_format: Any, path: Path) -> None:
    torch.manual_seed(0)
    ens = Ensemble([convolutional() for _ in range(3)]).eval()
    x = torch.randn(4, 3, 8, 8)
    plain = export.onnx(ens, x, path)
    template = ens._planner.pool.take()
    adopt(template, memory_format)
    ens._planner.pool.give_back(template)
    strides = [parameter.stride() for parameter in ens.parameters()]
    assert export.onnx(ens, x, path).ops == plain.ops
    assert [parameter.stride() for parameter in ens.parameters()] == strides


# Names


class Detects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, image: Tensor, extras: dict[str, Any], *, scale: Tensor) -> Any:
        y = self.linear(image) * scale
        return {"logits": y, "boxes": [y + extras["shift"][0], y.shape[0]], "note": "text"}


@dataclass
class Prediction:
    mean: Tensor
    variance: Tensor


class Gaussian(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Prediction:
        y = self.linear(x)
        return Prediction(y, y.exp())


def test_names_are_those_of_the_model(path: Path) -> None:
    ens = Ensemble([Detects() for _ in range(2)]).eval()
    args = (X, {"shift": (torch.ones(5, 1), None)})
    kwargs = {"scale": torch.ones(1)}
    written = export.onnx(ens, args, path, kwargs=kwargs, batch_axes={"scale": None})
    assert [str(port) for port in written.inputs] == [
        "image: float32 (batch, 3)",
        "extras.shift.0: float32 (batch, 1)",
        "scale: float32 (1)",
    ]
    assert [port.name for port in written.outputs] == ["logits", "boxes.0"]
    assert written.left_out == ("boxes.1", "note")
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == [port.name for port in written.inputs]
    assert [value.name for value in graph.output] == ["logits", "boxes.0"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    export.onnx(
        ens,
        args,
        path,
        kwargs=kwargs,
        batch_axes={"scale": None},
        input_names=["a", "b", "c"],
        output_names=["d", "e"],
    )
    graph = onnx.load(path).graph
    assert [value.name for value in (*graph.input, *graph.output)] == list("abcde")


@pytest.mark.slow
def test_fields_of_a_dataclass_are_names(path: Path) -> None:
    written = export.onnx(Ensemble([Gaussian() for _ in range(2)]).eval(), X, path)
    assert [port.name for port in written.outputs] == ["mean", "variance"]


def test_wrong_numbers_of_names(path: Path) -> None:
    ens = linear_ensemble()
    with pytest.raises(ValueError, match="input_names has 2 names, but there are 1 tensors: input"):
        export.onnx(ens, X, path, input_names=["a", "b"])
    with pytest.raises(ValueError, match="output_names has 0 names, but there are 1 tensors: outp"):
        export.onnx(ens, X, path, output_names=[])


@pytest.mark.slow
def test_per_member_inputs_keep_their_member_axis(path: Path) -> None:
    ens = linear_ensemble()
    written = export.onnx(ens, per_member(torch.stack([X] * 3)), path)
    assert str(written.inputs[0]) == "input: float32 (3, batch, 3)"
    xs = torch.randn(3, 7, 3)
    (found,) = run(path, input=xs)
    torch.testing.assert_close(found, ens(per_member(xs)).detach())


# Combinations


@pytest.mark.parametrize(
    "name",
    ["uncertainty", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mean", "vote"))],
)
def test_combinations(name: Any, path: Path) -> None:
    ens = linear_ensemble()
    weights = [0.2, 0.3, 0.5]
    ens.combination.set(weights=weights)
    logits = ens(X).detach()
    want = {
        "mean": {"outputs": combine.weighted(logits, weights)},
        "vote": {"outputs": combine.vote(logits)},
        "uncertainty": uncertainty.classification(logits, weights=weights)._asdict(),
    }[name]
    written = export.onnx(ens, X[:2], path, combination=name)
    assert [port.name for port in written.outputs] == list(want)
    torch.testing.assert_close(run(path, input=X), list(want.values()))


@pytest.mark.slow
@pytest.mark.parametrize("fitted", [False, True])
def test_probabilities(fitted: bool, path: Path) -> None:
    ens = linear_ensemble()
    if fitted:
        ens.combination.set(weights=[1, 2, 3], temperatures=[0.5, 1.0, 2.0], pooled_temperature=0.7)
    export.onnx(ens, X[:2], path, combination="probabilities")
    want = ens.combination.probabilities(ens(X).detach())
    torch.testing.assert_close(run(path, input=X)[0], want)


# The report


def test_the_report_is_frozen_and_prints(path: Path) -> None:
    written = export.onnx(linear_ensemble(), X, path)
    with pytest.raises(FrozenInstanceError):
        written.kind = "PNG"  # type: ignore[misc]
    head, *lines, difference = str(written).splitlines()
    assert head == f"{path}  ({written.kind}, {written.num_bytes} bytes)"
    assert written.kind.startswith("ONNX, opset ")
    assert lines == [
        "  inputs      input: float32 (batch, 3)",
        "  outputs     outputs: float32 (3, batch, 4)",
        "  ops         1 Gemm, 1 Reshape, 1 Transpose",
    ]
    assert difference.startswith("  difference  ")
    assert difference.endswith(" relative in batches of 5, 11")
    assert written.num_bytes == path.stat().st_size


def test_nothing_is_printed_and_nothing_of_this_machine_is_in_the_file(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export.onnx(linear_ensemble(), X, path)
    assert capfd.readouterr() == ("", "")
    assert b".py" not in path.read_bytes()
    assert b"/" not in path.read_bytes()


# What fails


def test_train_mode_is_refused(path: Path) -> None:
    ens = linear_ensemble().train()
    with pytest.raises(
        ExportError, match=r"export.onnx: the ensemble is in train mode,(?s:.*)\n    ens.eval\(\)"
    ):
        export.onnx(ens, X, path)
    mixed = Ensemble([nn.Sequential(nn.Linear(3, 3), nn.Dropout()) for _ in range(2)]).eval()
    mixed.members[1].training = True
    with pytest.raises(ExportError, match=r"export.onnx: `1` is in train mode"):
        export.onnx(mixed, X, path)


def test_what_differs_is_named_and_the_old_file_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ens = linear_ensemble()
    path.write_text("old")

    def spoil(model: Any) -> None:
        (bias,) = [v for v in model.graph.initializers.values() if tuple(v.shape) == (3, 4)]
        wrong = bias.const_value.numpy().copy()
        wrong[2, 1] += 1
        bias.const_value = onnx_ir.tensor(wrong, name=bias.name)

    onnx_ir = pytest.importorskip("onnx_ir")
    monkeypatch.setattr(onnx_file, "simplify", spoil)
    with pytest.raises(
        ExportError,
        match=r"export.onnx: what was exported computes something else than the ensemble, so the"
        r" file isn't kept:\n\n  `outputs` in a batch of 5: [-\d.e]+ at \(2, \d, 1\); the ensemble"
        r" has [-\d.e]+, allowed 1.0e-04\n  `outputs` in a batch of 11: ",
    ):
        export.onnx(ens, X, path)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]
    export.onnx(ens, X, path, tolerance=2)


def test_an_op_that_onnx_lacks_is_named_with_its_place(path: Path) -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = nn.Sequential(nn.Linear(3, 3), nn.Bilinear(3, 3, 2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.pool[0](x)
            return self.pool[1](y, y)

    with pytest.raises(
        ExportError,
        match=r"export.onnx: ONNX, or torch's exporter to it, has no `aten._trilinear` \(in"
        r" `pool.1` \(Bilinear\), test_onnx.py:\d+\). export.package and export.program export it",
    ):
        export.onnx(Ensemble([Pools() for _ in range(2)]).eval(), X, path)
    assert not list(path.parent.iterdir())


def test_a_kernel_that_onnxruntime_lacks_is_named(path: Path) -> None:
    ens = Ensemble([nn.Conv1d(1, 2, 2).double() for _ in range(2)]).eval()
    with pytest.raises(
        ExportError,
        match=r"export.onnx: onnxruntime has no kernel on CPUs for the operator Conv \(version"
        r" \d+\) in the dtypes of this ensemble; most kernels take float32 alone: ens.float\(\)",
    ):
        export.onnx(ens, torch.ones(2, 1, 5).double(), path)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_told_at_once(
    package: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf'{package}, .*pip install "unisono\[export\]"'):
        export.onnx(linear_ensemble(), X, path)


# Weights of more than 2 GB


@pytest.mark.slow
def test_large_weights_lie_beside_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(3, 300), nn.Linear(300, 2))  # noqa: E731
    monkeypatch.setattr(onnx_model, "LARGEST", 1000)
    for _ in range(2):  # over another one
        ens = Ensemble([make() for _ in range(3)]).eval()
        written = export.onnx(ens, X, path)
        data, file = sorted(path.parent.iterdir(), key=lambda p: len(p.name), reverse=True)
        assert file == path
        assert data.match("ens.onnx.*.data")
        assert path.stat().st_size < 5000
        assert data.stat().st_size >= 4 * 3 * (3 * 300 + 300 * 2)
        assert written.num_bytes == data.stat().st_size + path.stat().st_size
        torch.testing.assert_close(run(path, input=X)[0], ens(X).detach(), rtol=0, atol=1e-5)
    monkeypatch.setattr(onnx_model, "LARGEST", 10**9)
    export.onnx(ens, X, path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_large_weights_that_differ_leave_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_model, "LARGEST", 0)
    with pytest.raises(ExportError, match="computes something else"):
        export.onnx(linear_ensemble(), 1000 * X, path, tolerance=-1.0)
    assert not list(path.parent.iterdir())
