"""`unisono inspect`: what is in a file, and which members are unlike the others."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from unisono import Ensemble, fit, optim
from unisono.cli import main
from unisono.commands.inspect import run_inspect
from unisono.commands.norms import norms_by_tensor, norms_of_members


def make_net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


class Everything(nn.Module):
    """Tensors of all sorts."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.b.weight = self.a.weight
        self.backbone = nn.Linear(3, 5)
        self.a.bias.requires_grad_(False)
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("scratch", torch.randn(2), persistent=False)
        self.register_buffer("nothing", torch.zeros(0, 3))
        self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex128))
        self.register_buffer("eighth", torch.randn(5).to(torch.float8_e4m3fn))

    def forward(self, x):
        return self.b(self.a(x))


@pytest.fixture
def saved(tmp_path):
    """A file, and the ensemble in it: member 3 has a NaN, 5 is all zeros, 7 far, 2 equal to 1."""
    ens = Ensemble.build(make_net, 10)
    with torch.no_grad():
        ens.members[0].weight[3, 0, 0] = torch.nan
        for parameter in ens.members.parameters():
            parameter[5] = 0
            parameter[7] *= 50
    ens.copy_(1, 2)
    path = tmp_path / "ens.safetensors"
    ens.save(path)
    return path, ens


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


# Numbers ------------------------------------------------------------------------------------------


def test_norms_and_distances_are_those_of_the_members(tmp_path):
    ens = Ensemble.build(make_net, 5).double()
    ens.save(tmp_path / "f")
    found = run_inspect(tmp_path / "f")
    own = [dict(member.named_parameters()) for member in ens.unstack()]
    mean = {name: torch.stack([p[name] for p in own]).mean(0) for name in own[0]}
    norm = [math.sqrt(sum(p.square().sum().item() for p in each.values())) for each in own]
    distance = [
        math.sqrt(sum((p - mean[name]).square().sum().item() for name, p in each.items()))
        for each in own
    ]
    np.testing.assert_allclose(found.norms.norm, norm, rtol=1e-12)
    np.testing.assert_allclose(found.norms.distance, distance, rtol=1e-12)
    by_name = {tensor.name: tensor for tensor in found.tensors}
    expected = [member.get_buffer("1.running_var").norm().item() for member in ens.unstack()]
    np.testing.assert_allclose(by_name["1.running_var"].norms.norm, expected, rtol=1e-12)
    assert list(found.remarks) == [""] * 5


def test_pieces_make_no_difference(tmp_path, monkeypatch):
    Ensemble.build(Everything, 4, shared="backbone.*").save(tmp_path / "f")
    whole = run_inspect(tmp_path / "f").to_json()
    monkeypatch.setattr("unisono.checkpoint.scanning._ELEMENTS", 7)
    pieces = run_inspect(tmp_path / "f").to_json()
    assert whole.pop("norms") == [
        {key: pytest.approx(value) for key, value in row.items()} for row in pieces.pop("norms")
    ]
    for a, b in zip(whole.pop("tensors"), pieces.pop("tensors"), strict=True):
        norms = a.pop("norm"), b.pop("norm")
        assert norms[0] is norms[1] is None or norms[0] == pytest.approx(norms[1])
        assert a == b
    assert whole == pieces


def test_a_member_with_a_nan_spoils_no_other_distance():
    w = torch.randn(4, 6)
    broken = torch.cat([w, torch.full((1, 6), torch.nan)])
    clean, found = (norms_by_tensor([("w", x)])["w"] for x in (w, broken))
    np.testing.assert_allclose(found.distance[:4], clean.distance)
    assert math.isnan(found.distance[4])
    assert found.not_finite.tolist() == [0, 0, 0, 0, 6]
    assert math.isnan(norms_of_members([found, found], 5).norm[4])


def test_broken_members_are_told(saved):
    remarks = run_inspect(saved[0]).remarks
    assert remarks[3] == "not finite: 1 of its values"
    assert remarks[5] == "all zeros"
    assert remarks[7].startswith("far: ")
    assert remarks[2] == "equal to member 1"
    assert [i for i, text in enumerate(remarks) if text] == [2, 3, 5, 7]


# What is listed -----------------------------------------------------------------------------------


def test_every_sort_of_tensor(tmp_path):
    Ensemble.build(Everything, 4, shared="backbone.*").eval().save(tmp_path / "f")
    found = run_inspect(tmp_path / "f")
    own = {t.name: (t.what, t.shared, t.shape, t.nbytes) for t in found.tensors}
    assert own == {
        "a.weight": ("parameter", False, (3, 3), 4 * 36),
        "a.bias": ("frozen", False, (3,), 4 * 12),
        "b.bias": ("parameter", False, (3,), 4 * 12),
        "backbone.weight": ("parameter", True, (5, 3), 60),
        "backbone.bias": ("parameter", True, (5,), 20),
        "steps": ("buffer", False, (), 4 * 8),
        "scratch": ("transient", False, (2,), 4 * 8),
        "nothing": ("buffer", False, (0, 3), 0),
        "phase": ("parameter", False, (4,), 4 * 64),
        "eighth": ("buffer", False, (5,), 4 * 5),
    }
    plain = found.to_json()
    assert plain["ties"] == {"b.weight": "a.weight"}
    assert plain["parameters"] == {"each": 9 + 3 + 3 + 4, "shared": 20}
    assert plain["options"] == {"strategy": "auto", "randomness": "different", "chunk_size": None}
    assert plain["modules"]["a"]["class"] == "torch.nn.modules.linear.Linear"
    assert {t["name"]: t["norm"] for t in plain["tensors"]}["steps"] is None


def test_json_is_alone_on_standard_output(capsys, saved):
    code, out, err = run(capsys, "inspect", saved[0], "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["kind"], found["members"], found["checked"]) == ("ensemble", 10, True)
    assert found["norms"][3] == {
        "member": 3,
        "norm": None,
        "distance": None,
        "remark": "not finite: 1 of its values",
    }


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit(capsys, monkeypatch, saved, width):
    monkeypatch.setenv("COLUMNS", str(width))
    saved[1].combination.set(weights=[0.1] * 10)
    saved[1].save(saved[0])
    code, out, err = run(capsys, "inspect", saved[0].parent / saved[0].name)
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines()[1:])) <= width
    for text in (
        "ens.safetensors: an ensemble of unisono, ",
        "10 members of 56 parameters each",
        "of torch.nn.modules.container.Sequential: 2 Linear, 1 BatchNorm1d, 1 ReLU",
        "options: strategy='auto', randomness='different', chunk_size=None",
        "combination: weights 0.1, 0.1, ",
        "mode: train",
        "their checksums agree",
        "not finite: 1 of its values",
        "equal to member 1",
    ):
        assert text in out


def test_of_many_members_the_unusual_and_the_farthest_are_shown(capsys, tmp_path):
    ens = Ensemble.build(lambda: nn.Linear(2, 2), 50)
    ens.copy_(0, 49)
    ens.save(tmp_path / "f")
    code, out, _ = run(capsys, "inspect", tmp_path / "f")
    assert code == 0
    assert "equal to member 0" in out
    assert "18 more members are nearer to the mean; --json has all" in out


def test_no_class_is_needed(saved, monkeypatch):
    def refuse(*_):
        raise AssertionError("inspect makes no model")

    monkeypatch.setattr(nn.Module, "__init__", refuse)
    assert run_inspect(saved[0]).members == 10


# Other files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_member_s_checkpoint(capsys, tmp_path, suffix):
    path = tmp_path / f"member.{suffix}"
    Ensemble.build(make_net, 2).save_member(1, path)
    found = run_inspect(path)
    assert (found.kind, found.members, found.checked) == ("model", None, False)
    model = make_net()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {t.name: t.shape for t in found.tensors} == shapes
    code, out, _ = run(capsys, "inspect", path)
    assert code == 0
    assert "the checkpoint of one model, " in out
    assert "3.weight" in out


def test_a_folder_of_shards(tmp_path):
    state = make_net().state_dict()
    names = list(state)
    parts = {"a.safetensors": names[:3], "b.safetensors": names[3:]}
    for file, own in parts.items():
        save_file({name: state[name] for name in own}, tmp_path / file)
    index = {"weight_map": {name: file for file, own in parts.items() for name in own}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = run_inspect(tmp_path)
    assert sorted(t.name for t in found.tensors) == sorted(names)


def test_a_folder_of_the_hub(tmp_path, saved):
    shutil.copy(saved[0], tmp_path / "model.safetensors")
    assert run_inspect(tmp_path).members == 10


def test_where_the_state_dict_is(capsys, tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"epoch": 3, "best": {"model": make_net().state_dict()}}, path)
    code, _, err = run(capsys, "inspect", path)
    assert code == 2
    assert "perhaps --select best" in err
    assert run(capsys, "inspect", path, "--select", "best.model")[0] == 0


def test_a_training_checkpoint_is_called_one(tmp_path):
    path = tmp_path / "c.safetensors"
    ens = Ensemble.build(lambda: nn.Linear(3, 2), 2)
    data = torch.randn(8, 3), torch.randint(2, (8,))
    optimizer = optim.Adam(ens)
    loss = nn.functional.cross_entropy
    fit(ens, data, loss=loss, optimizer=optimizer, epochs=1, checkpoint=path, progress=False)
    found = run_inspect(path)
    assert (found.kind, found.checked) == ("training", True)
    assert "ensemble.weight" in {t.name for t in found.tensors}


@pytest.mark.parametrize("name", ["cancer_run", "diabetes_run"])
def test_a_run_on_a_table(request, name):
    found = run_inspect(request.getfixturevalue(name))
    assert (found.kind, found.members, len(found.norms.norm)) == ("table run", 3, 3)
    assert {t.name for t in found.tensors if t.shared} == {"standardise.mean", "standardise.scale"}
    assert list(found.remarks) == ["", "", ""]


def test_a_run_on_images(capsys, tmp_path, digits_run):
    found = run_inspect(digits_run)
    assert (found.kind, found.members) == ("ensemble", 2)
    assert found.facts.outline[""]["class"] == "unisono.commands.models.SimpleCNN"
    path = shutil.copytree(digits_run, tmp_path / "run") / "ensemble.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    code, _, err = run(capsys, "inspect", tmp_path / "run")
    assert code == 2
    assert "it isn't the file that run.json describes" in err


# Damage -------------------------------------------------------------------------------------------


def test_damaged_tensors_and_members_are_named(capsys, saved):
    path, _ = saved
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the smallest elements come last: the last row of `3.weight`
    path.write_bytes(content)
    code, out, err = run(capsys, "inspect", path)
    assert (code, out) == (2, "")
    assert err == (
        f"unisono inspect: {path} isn't an ensemble of unisono: the values of `members.3.weight` "
        "in members [9] are not those that were saved\n"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "isn't an ensemble or the checkpoint of a model: "),
        (b"nonsense " * 9, "no safetensors file begins like this, or it was cut off after 81"),
    ],
    ids=["empty", "text"],
)
def test_other_files_are_one_line(capsys, tmp_path, content, message):
    path = tmp_path / "f.safetensors"
    path.write_bytes(content)
    code, out, err = run(capsys, "inspect", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_what_isn_t_there(capsys, tmp_path):
    code, _, err = run(capsys, "inspect", tmp_path / "no.safetensors")
    path = tmp_path / "no.safetensors"
    assert (code, err) == (2, f"unisono inspect: can't read {path}: No such file or directory\n")
    code, _, err = run(capsys, "inspect", tmp_path)
    assert code == 2
    assert "is a folder without model.safetensors" in err


def test_code_in_a_pickle_isn_t_run(capsys, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"weight": Payload()}, tmp_path / "f.pt")
    code, _, err = run(capsys, "inspect", tmp_path / "f.pt")
    assert (code, err.count("\n")) == (2, 1)
    assert not (tmp_path / "made").exists()


def test_names_do_nothing_to_the_terminal(capsys, tmp_path):
    save_file({"\x1b[2Ja[red]b[/none]": torch.zeros(2)}, tmp_path / "f.safetensors")
    code, out, _ = run(capsys, "inspect", tmp_path / "f.safetensors")
    assert code == 0
    assert out.count(r"\x1b[2Ja[red]b[/none]") == 2
    assert "\x1b" not in out
    code, _, err = run(capsys, "inspect", tmp_path / "\x1b[2J.safetensors")
    assert code == 2
    assert r"\x1b[2J.safetensors" in err
