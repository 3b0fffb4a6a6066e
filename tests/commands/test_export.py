"""`unisono export`: files that compute what the ensemble of a run or of a file computes."""

import os
import sys

import numpy as np
import pytest
import torch
from torch import nn

from unisono import Ensemble
from unisono.cli import main
from unisono.commands.data import LOADERS
from unisono.commands.exported import parse_example, read_exported
from unisono.commands.models import SimpleCNN
from unisono.commands.run_folder import RunFolder
from unisono.commands.table_estimator import load_members

onnxruntime = pytest.importorskip("onnxruntime")

NETS = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

def tokens():
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x) if x.sum().item() > 0 else x
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    (tmp_path / "exported_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "exported_nets", raising=False)
    import exported_nets

    return exported_nets


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def by_onnx(path, x):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


# What comes out -----------------------------------------------------------------------------------


def test_a_run_on_images(capsys, digits_run):
    code, out, err = run(capsys, "export", digits_run, "--to", "onnx", "--out", "ens.onnx")
    assert (code, err) == (0, "")
    assert out.startswith(
        "input: images with grey values from 0 to 1\noutput: the logits of 10 classes\n"
        "wrote ens.onnx  (ONNX, opset "
    )
    assert "float32 (batch, 1, 8, 8)" in out
    assert "  difference  " in out
    images = LOADERS["digits"]().test_images
    (logits,) = by_onnx("ens.onnx", images)
    expected = RunFolder(digits_run).test_outputs().outputs.numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_run_s_ensemble_is_that_of_the_training(digits_run):
    found = read_exported(digits_run, None)
    again = Ensemble.load(
        digits_run / "ensemble.safetensors", lambda: SimpleCNN((1, 8, 8), 10)
    ).eval()
    x = found.example[0]
    torch.testing.assert_close(found.ensemble(x), again(x))


@pytest.mark.parametrize("to", [pytest.param("onnx", marks=pytest.mark.slow), "program"])
def test_a_saved_ensemble_with_a_combination(capsys, nets, to):
    ens = Ensemble.build(nets.make, 3).train()
    ens.combination.set(weights=[0.2, 0.3, 0.5])
    ens.save("ens.safetensors")
    out = f"ens.{'onnx' if to == 'onnx' else 'pt2'}"
    options = ["--model", "exported_nets:make", "--example", "8x4", "--out", out]
    code, text, err = run(
        capsys,
        *("export", "ens.safetensors", "--to", to, "--combination", "probabilities", *options),
    )
    assert (code, err) == (0, "")
    assert "outputs: float32 (batch, 3)" in text
    x = torch.randn(5, 4)
    expected = ens.combination.probabilities(ens.eval()(x))
    if to == "onnx":
        found = torch.from_numpy(by_onnx(out, x)[0])
    else:
        found = torch.export.load(out).module()(x)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_package(capsys, digits_run):
    code, out, err = run(capsys, "export", digits_run, "--to", "pt2", "--out", "ens.pt2")
    assert (code, err) == (0, "")
    assert "wrote ens.pt2  (AOTInductor, cpu, " in out
    images = LOADERS["digits"]().test_images
    found = torch._inductor.aoti_load_package("ens.pt2")(images)
    expected = RunFolder(digits_run).test_outputs().outputs
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_integers_and_several_examples(capsys, nets):
    Ensemble.build(nets.tokens, 2).save("ens.safetensors")
    code, out, _ = run(
        capsys,
        *("export", "ens.safetensors", "--to", "program", "--model", "exported_nets:tokens"),
        *("--example", "8x7:int64", "--out", "ens.pt2"),
    )
    assert code == 0
    assert "input: int64 (batch, 7)" in out


def test_a_classification_of_a_table(cancer_run):
    exported = read_exported(cancer_run, None)
    assert exported.notes[0].endswith(
        "features that preprocessing.safetensors makes of the columns, not the columns themselves"
    )
    assert exported.notes[1].startswith("output: the logits of ")
    members = load_members(RunFolder(cancer_run), None, torch.device("cpu"))
    x = np.random.default_rng(0).normal(size=(9, members.n_features)).astype(np.float32)
    found = exported.ensemble(torch.from_numpy(x)).detach().softmax(-1).mean(0)
    expected = members.predict_uncertainty(x).prediction
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_regression_of_a_table_is_in_the_unit_of_the_target(capsys, diabetes_run):
    code, out, err = run(capsys, "export", diabetes_run, "--to", "program", "--out", "ens.pt2")
    assert (code, err) == (0, "")
    assert "output: mean and variance, in the unit of the target\n" in out
    members = load_members(RunFolder(diabetes_run), None, torch.device("cpu"))
    x = np.random.default_rng(0).normal(size=(9, members.n_features)).astype(np.float32)
    found = torch.export.load("ens.pt2").module()(torch.from_numpy(x))
    mean, variance = (part.detach().numpy() for part in found)
    expected = members.predict_uncertainty(x)
    np.testing.assert_allclose(mean[..., 0].mean(0), expected.prediction, rtol=1e-4)
    np.testing.assert_allclose(variance[..., 0].mean(0), expected.aleatoric, rtol=1e-4)


# What can't be ------------------------------------------------------------------------------------

WRONG = [
    (
        "--to tflite --out e.onnx",
        "unknown format 'tflite'; choose onnx or pt2 or program",
    ),
    ("--to onnx --out e.pt2", "--out e.pt2: onnx is written to NAME.onnx"),
    ("--to onnx --out no/e.onnx", "--out no/e.onnx: there is no folder no"),
    (
        "--to onnx --out e.onnx",
        (
            "ens.safetensors is no run of unisono train: say with --model package.module:factory "
            "what its members are"
        ),
    ),
    (
        "--to onnx --out e.onnx --model exported_nets:make",
        "--example SHAPE is needed, as 64x784: what a call takes",
    ),
    (
        "--to onnx --out e.onnx --model exported_nets:make --example 8by4",
        "--example 8by4: write sizes and a dtype, as 64x784 or 8x20:int64",
    ),
    (
        "--to onnx --out e.onnx --model exported_nets:make --example 8x4:real",
        "--example 8x4:real: write sizes and a dtype, as 64x784 or 8x20:int64",
    ),
    (
        "--to onnx --out e.onnx --model exported_nets:make --example 8x5",
        "the members can't be called with (8, 5) of float32: RuntimeError: ",
    ),
    (
        "--to onnx --out e.onnx --model exported_nets:make --example 8x4 --combination all",
        "unknown combination 'all'; choose mean or probabilities or vote or uncertainty",
    ),
    (
        "--to onnx --out e.onnx --model exported_nets:tokens --example 8x4",
        "Ensemble.load: ens.safetensors was saved from another architecture than make_model() ",
    ),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_argument_is_one_line_and_code_2(capsys, nets, line, message):
    Ensemble.build(nets.make, 2).save("ens.safetensors")
    before = set(os.listdir())
    code, out, err = run(capsys, "export", "ens.safetensors", *line.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"unisono export: {message}")
    assert set(os.listdir()) - {"__pycache__"} == before - {"__pycache__"}


def test_a_model_that_cannot_be_exported_is_code_1(capsys, nets):
    Ensemble.build(nets.Branches, 2).save("ens.safetensors")
    code, _, err = run(
        capsys,
        *("export", "ens.safetensors", "--to", "program", "--model", "exported_nets:Branches"),
        *("--example", "8x4", "--out", "ens.pt2"),
    )
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("unisono export: export.program: ")
    assert not os.path.exists("ens.pt2")


def test_a_run_of_other_code_asks_for_it(capsys, digits_run):
    code, _, err = run(
        capsys, *("export", digits_run, "--to", "onnx", "--out", "e.onnx", "--model", "a:b")
    )
    assert code == 2
    assert err.endswith(f"--model a:b: the members of {digits_run} are made by cnn\n")


def test_examples():
    assert parse_example("2x3:bool").dtype == torch.bool
    assert parse_example("2x3:int64").max() <= 1
    assert parse_example("4").shape == (4,)
    assert torch.equal(parse_example("4x4"), parse_example("4x4"))
    assert isinstance(nn.Linear(4, 2)(parse_example("4x4")), torch.Tensor)
