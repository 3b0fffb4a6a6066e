"""`unisono merge` and `unisono split`: state dicts in, state dicts out."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cases import CASES, N
from unisono import Ensemble
from unisono.cli import main
from unisono.commands.models import SimpleCNN
from unisono.commands.split import run_split

NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.encoder = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight
        self.register_buffer("scratch", torch.randn(2), persistent=False)
        self.register_buffer("steps", torch.tensor(7))

    def forward(self, x):
        return self.decoder(self.encoder(self.norm(self.backbone(x))))

def fails():
    raise ValueError("no weights")

def text():
    return "a model"

number = 5
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    """A module of the user's in the current folder, and two checkpoints of its class."""
    (tmp_path / "merged_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "merged_nets", raising=False)
    import merged_nets

    models = [merged_nets.Net() for _ in range(2)]
    models[1].backbone.load_state_dict(models[0].backbone.state_dict())
    for name, model in zip("ab", models, strict=True):
        torch.save(model.state_dict(), f"{name}.pt")
    return merged_nets, models


def run(capsys, line):
    code = main(line.split())
    out, err = capsys.readouterr()
    return code, out, err


MERGE = "merge a.pt b.pt --model merged_nets:Net --out ens.safetensors"


# There and back -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_two_files_and_back(capsys, nets, kind):
    module, models = nets
    code, out, err = run(capsys, MERGE)
    parameters = sum(p.numel() for p in models[0].parameters())
    assert (code, err) == (0, "")
    assert out == f"wrote ens.safetensors: 2 members of {parameters} parameters each\n"
    assert len(Ensemble.load("ens.safetensors", module.Net)) == 2
    code, out, err = run(capsys, f"split ens.safetensors --out members --format {kind}")
    assert (code, err) == (0, "")
    assert out == (
        "left out, as a state dict does: `scratch`, which are not persistent\n"
        f"wrote members/member_0.{kind}\nwrote members/member_1.{kind}\n"
    )
    for i, model in enumerate(models):
        path = f"members/member_{i}.{kind}"
        state = torch.load(path, weights_only=True) if kind == "pt" else load_file(path)
        fresh = module.Net()
        fresh.load_state_dict(state, strict=True)
        assert state.keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(fresh.state_dict()[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_members_of_every_model_load_strictly(tmp_path, case):
    ens = Ensemble([case.make() for _ in range(N)])
    ens.save("every.safetensors")
    report = run_split(tmp_path / "every.safetensors", tmp_path / "every")
    for i, path in enumerate(report.files):
        fresh = case.make()
        fresh.load_state_dict(torch.load(path, weights_only=True), strict=True)
        expected = ens[i].state_dict()
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_some_members_under_names_that_sort(capsys):
    ens = Ensemble.build(lambda: nn.Linear(3, 2), 12)
    ens.combination.set(weights=[1.0] * 12)
    ens.save("twelve.safetensors")
    code, out, _ = run(capsys, "split twelve.safetensors --out some --members 11,3")
    assert code == 0
    assert out == (
        "left out, since they are of the ensemble: weights\n"
        "wrote some/member_11.pt\nwrote some/member_03.pt\n"
    )
    assert torch.equal(torch.load("some/member_03.pt")["weight"], ens[3].weight)


def test_only_the_bytes_of_a_member_are_in_its_file():
    Ensemble.build(lambda: nn.Linear(100, 100), 20).save("large.safetensors")
    (path,) = run_split(Path("large.safetensors"), Path("one"), "pt", "4").files
    assert path.stat().st_size < 2 * 4 * 100 * 101


def test_a_shared_part(capsys, nets):
    code, _, _ = run(capsys, f"{MERGE} --shared backbone.*")
    assert code == 0
    assert load_file("ens.safetensors")["members.backbone.weight"].shape == (6, 4)
    assert run(capsys, "split ens.safetensors --out members")[0] == 0
    nets[0].Net().load_state_dict(torch.load("members/member_1.pt"), strict=True)


def test_select_and_strip(capsys, nets):
    for name in "ab":
        state = {f"module.{key}": value for key, value in torch.load(f"{name}.pt").items()}
        torch.save({"epoch": 3, "best": {"model": state}}, f"{name}2.pt")
    line = MERGE.replace(".pt", "2.pt")
    code, _, err = run(capsys, line)
    assert code == 2
    assert "a2.pt: there are more than tensors, but epoch, best;" in err
    assert "b2.pt: " in err
    code, _, err = run(capsys, f"{line} --select best.net")
    assert code == 2
    assert "--select best.net: what is under best has no 'net', but model" in err
    code, _, err = run(capsys, f"{line} --select best.model")
    assert code == 2
    assert "--strip module." in err
    assert run(capsys, f"{line} --select best.model --strip module.")[0] == 0
    found = Ensemble.load("ens.safetensors", nets[0].Net)
    assert torch.equal(found[1].encoder.weight, nets[1][1].encoder.weight)


def test_a_run_on_images(capsys, digits_run):
    assert run(capsys, f"split {digits_run} --out members")[0] == 0
    model = SimpleCNN((1, 8, 8))
    model.load_state_dict(torch.load("members/member_1.pt"), strict=True)


# What can't be ------------------------------------------------------------------------------------

WRONG = [
    (
        "merge a.pt c.pt --model merged_nets:Net --out ens.safetensors",
        "can't read c.pt: No such file or directory",
    ),
    (
        "merge a.pt --model merged_nets --out ens.safetensors",
        "--model merged_nets: expected package.module:factory",
    ),
    (
        "merge a.pt --model merged_nets:Not --out ens.safetensors",
        "--model merged_nets:Not: 'merged_nets' has no 'Not'",
    ),
    (
        "merge a.pt --model merged_nets:fails --out ens.safetensors",
        "--model merged_nets:fails: merged_nets:fails() failed: ValueError: no weights",
    ),
    (
        "merge a.pt --model merged_nets:text --out ens.safetensors",
        ("--model merged_nets:text: expected a torch.nn.Module from merged_nets:text(), got str"),
    ),
    (
        "merge a.pt --model merged_nets:Net --out ens.pt",
        "--out ens.pt: an ensemble is saved as NAME.safetensors",
    ),
    (
        "merge a.pt --model merged_nets:Net --out none/ens.safetensors",
        "--out none/ens.safetensors: there is no folder none",
    ),
    (
        "merge a.pt --model merged_nets:Net --out a.pt",
        "--out a.pt is one of the inputs; give another file",
    ),
    ("split a.pt --out members", "a.pt isn't an ensemble of unisono: "),
    ("split none.safetensors --out members", "can't read none.safetensors: No such file or "),
    (
        "split saved.safetensors --out members --format zip",
        "unknown format 'zip'; choose pt or safetensors",
    ),
    (
        "split saved.safetensors --out members --members 0,2",
        "--members 0,2: there is no member 2, of 2",
    ),
    (
        "split saved.safetensors --out members --members first",
        "--members first: write numbers, as 0,3",
    ),
    ("split saved.safetensors --out a.pt", "--out a.pt is a file; give a folder"),
    (
        "split saved.safetensors --out full",
        "full/member_0.pt exist already; name another folder with --out",
    ),
]


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_what_cannot_be_is_one_line_and_changes_nothing(capsys, nets, line, message):
    Ensemble(nets[1]).save("saved.safetensors")
    os.mkdir("full")
    torch.save({}, "full/member_0.pt")
    before = sorted(os.listdir()), os.listdir("full")
    code, out, err = run(capsys, line)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"unisono {line.split()[0]}: {message}")
    after = sorted(name for name in os.listdir() if name != "__pycache__")
    assert (after, os.listdir("full")) == ([n for n in before[0] if n != "__pycache__"], before[1])


def test_every_file_that_doesn_t_fit_is_named(capsys):
    torch.save(nn.Linear(2, 2).state_dict(), "c.pt")
    code, _, err = run(capsys, MERGE.replace("b.pt", "b.pt c.pt"))
    assert code == 2
    assert "c.pt: `backbone.weight` is missing" in err
    assert not os.path.exists("ens.safetensors")


def test_safetensors_has_no_room_for_some_dtypes(capsys):
    Ensemble.build(lambda: nn.Linear(2, 2, dtype=torch.complex128), 2).save("c.safetensors")
    code, _, err = run(capsys, "split c.safetensors --out members --format safetensors")
    assert code == 2
    assert err == (
        "unisono split: --format safetensors has no room: `bias` is torch.complex128, `weight` is "
        "torch.complex128; take --format pt\n"
    )
    assert run(capsys, "split c.safetensors --out members")[0] == 0


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_full_disk_leaves_no_file(capsys, monkeypatch, nets, kind):
    Ensemble(nets[1]).save("saved.safetensors")
    real, calls = os.replace, []

    def full(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*paths)

    monkeypatch.setattr(os, "replace", full)
    code, _, err = run(capsys, f"split saved.safetensors --out members --format {kind}")
    assert (code, err) == (
        1,
        f"unisono split: can't write to members/member_1.{kind}: No space left on device\n",
    )
    assert not os.path.exists("members")


def test_ctrl_c_leaves_no_file(capsys, monkeypatch, nets):
    Ensemble(nets[1]).save("saved.safetensors")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    code, _, err = run(capsys, "split saved.safetensors --out members")
    assert (code, err) == (130, "unisono split: interrupted; nothing was written\n")
    assert not os.path.exists("members")
