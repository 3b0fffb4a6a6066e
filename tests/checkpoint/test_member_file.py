"""`Ensemble.from_checkpoints` and `ens.save_member`: files of single models, in and out."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch
from safetensors.torch import load_model, save_file
from torch import nn

from unisono import CheckpointError, Ensemble
from unisono.checkpoint import gathering
from unisono.checkpoint.member_file import open_member


def make_net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


@pytest.fixture
def models():
    return [make_net() for _ in range(3)]


def write_all(folder, models, suffix="pt", wrap=lambda state: state):
    paths = [folder / f"{i}.{suffix}" for i in range(len(models))]
    for path, model in zip(paths, models, strict=True):
        if suffix == "safetensors":
            save_file(model.state_dict(), path)
        else:
            torch.save(wrap(model.state_dict()), path)
    return paths


def assert_holds(ens, models):
    for i, model in enumerate(models):
        for name, tensor in model.state_dict().items():
            assert torch.equal(ens[i].state_dict()[name], tensor), (i, name)


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin", "ckpt", "safetensors"])
def test_member_i_has_the_values_of_file_i(tmp_path, models, suffix):
    paths = write_all(tmp_path, models, suffix)
    ens = Ensemble.from_checkpoints(make_net, paths, strategy="loop", chunk_size=2)
    assert_holds(ens, models)
    assert (ens.strategy, ens.chunk_size) == ("loop", 2)
    x = torch.randn(5, 4)
    assert torch.equal(ens.eval()(x)[1], models[1].eval()(x))
    assert_holds(Ensemble.from_checkpoints(make_net, map_to_str(paths[::-1])), models[::-1])


def map_to_str(paths):
    return [str(path) for path in paths]


def test_files_of_different_kinds_and_ages(tmp_path, models):
    paths = write_all(tmp_path, models)
    torch.save(models[0].state_dict(), paths[0], _use_new_zipfile_serialization=False)
    paths[1] = tmp_path / "1.safetensors"
    save_file(models[1].state_dict(), paths[1])
    torch.save({k: v.clone() for k, v in reversed(models[2].state_dict().items())}, paths[2])
    assert_holds(Ensemble.from_checkpoints(make_net, paths), models)


def test_tensors_that_lie_in_one_storage(tmp_path):
    """`ens[i].state_dict()` saved by hand: rows of larger storages."""
    ens = Ensemble.build(make_net, 3)
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for i, path in enumerate(paths):
        torch.save(ens[i].state_dict(), path)
    assert_holds(Ensemble.from_checkpoints(make_net, paths), list(ens))


def test_a_state_dict_inside_of_something(tmp_path, models):
    paths = write_all(tmp_path, models, wrap=lambda state: {"epoch": 3, "model": state})
    ens = Ensemble.from_checkpoints(make_net, paths, select=lambda found: found["model"])
    assert_holds(ens, models)
    with pytest.raises(CheckpointError, match="Ensemble") as caught:
        Ensemble.from_checkpoints(make_net, paths)
    assert (
        f"{paths[0]} isn't the checkpoint of a model: 'model' in it is no tensor (OrderedDict); say"
        " where the state dict is: select=lambda found: found['model']"
    ) in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_prefix_in_front_of_all_names(tmp_path, models, prefix):
    paths = write_all(
        tmp_path, models, wrap=lambda state: {prefix + name: t for name, t in state.items()}
    )
    with pytest.raises(CheckpointError, match="Ensemble") as caught:
        Ensemble.from_checkpoints(make_net, paths)
    advice = str(caught.value).partition("take it off: select=")[2].partition("\n")[0]
    assert advice == (
        f"lambda found: {{name.removeprefix('{prefix}'): tensor for name, tensor in found.items()}}"
    )
    ens = Ensemble.from_checkpoints(make_net, paths, select=eval(advice))
    assert_holds(ens, models)


def write_shards(folder, model, suffix="safetensors"):
    folder.mkdir()
    names = list(model.state_dict())
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    halves = {f"{stem}-1.{suffix}": names[:3], f"{stem}-2.{suffix}": names[3:]}
    for file, own in halves.items():
        state = {name: model.state_dict()[name] for name in own}
        if suffix == "safetensors":
            save_file(state, folder / file)
        else:
            torch.save(state, folder / file)
    weight_map = {name: file for file, own in halves.items() for name in own}
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_folders_of_the_hub(tmp_path, models, suffix):
    folders = [tmp_path / str(i) for i in range(3)]
    index = write_shards(folders[0], models[0], suffix)
    write_shards(folders[1], models[1])
    folders[2].mkdir()
    save_file(models[2].state_dict(), folders[2] / "model.safetensors")
    assert_holds(Ensemble.from_checkpoints(make_net, folders), models)
    assert_holds(Ensemble.from_checkpoints(make_net, [index]), models[:1])


def test_a_shard_that_lacks_what_the_index_says(tmp_path, models):
    index = write_shards(tmp_path / "0", models[0])
    content = json.loads(index.read_text())
    content["weight_map"]["3.bias"] = "model-1.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model-1.safetensors has no `3.bias`, which model."):
        Ensemble.from_checkpoints(make_net, [tmp_path / "0"])


def test_tied_tensors_may_stand_under_any_of_their_names(tmp_path):
    models = [Tied() for _ in range(2)]
    paths = [tmp_path / "0.pt", tmp_path / "1.safetensors"]
    torch.save(models[0].state_dict(), paths[0])
    once = {n: t for n, t in models[1].state_dict().items() if n != "a.weight"}
    save_file(once, paths[1])
    ens = Ensemble.from_checkpoints(Tied, paths)
    assert_holds(ens, models)
    assert ens.members.a.weight is ens.members.b.weight


def test_tied_tensors_that_differ(tmp_path):
    state = Tied().state_dict()
    state["b.weight"] = state["b.weight"] + 1
    torch.save(state, tmp_path / "0.pt")
    with pytest.raises(CheckpointError, match=r"`b.weight` differs from `a.weight`, the model h"):
        Ensemble.from_checkpoints(Tied, [tmp_path / "0.pt"])


def test_nan_is_nan(tmp_path):
    model = Tied()
    nn.init.constant_(model.a.weight, float("nan"))
    torch.save(model.state_dict(), tmp_path / "0.pt")
    ens = Ensemble.from_checkpoints(Tied, [tmp_path / "0.pt"] * 2, shared="a.weight")
    assert ens.members.a.weight.isnan().all()


def test_shared_tensors(tmp_path, models):
    models[1][0].load_state_dict(models[0][0].state_dict())
    paths = write_all(tmp_path, models)
    ens = Ensemble.from_checkpoints(make_net, paths[:2], shared="0.*")
    assert ens.members.get_parameter("0.weight").shape == (6, 4)
    assert_holds(ens, models[:2])
    with pytest.raises(CheckpointError, match="Ensemble") as caught:
        Ensemble.from_checkpoints(make_net, paths, shared="0.*")
    assert (
        f"{paths[2]}: `0.weight` differs from that of the first file, and shared= keeps one"
    ) in str(caught.value)


def test_buffers_that_no_file_keeps_come_from_the_model(tmp_path):
    class Frequencies(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.register_buffer("frequencies", torch.arange(2.0), persistent=False)

        def forward(self, x):
            return self.lin(x) * self.frequencies

    models = [Frequencies() for _ in range(2)]
    ens = Ensemble.from_checkpoints(Frequencies, write_all(tmp_path, models))
    assert torch.equal(ens.members.frequencies, torch.arange(2.0).expand(2, 2))

    def make_meta():
        with torch.device("meta"):
            return Frequencies()

    with pytest.raises(CheckpointError, match="`frequencies` isn't in a state dict, and make_mod"):
        Ensemble.from_checkpoints(make_meta, write_all(tmp_path, models))


def test_a_model_without_values_will_do(tmp_path, models):
    def make_meta():
        with torch.device("meta"):
            return make_net()

    assert_holds(Ensemble.from_checkpoints(make_meta, write_all(tmp_path, models)), models)


def test_everything_that_doesn_t_fit_is_listed(tmp_path, models):
    paths = write_all(tmp_path, models)
    state = models[1].state_dict()
    state["0.weight"] = torch.zeros(6, 5)
    state["3.bias"] = state["3.bias"].double()
    state["more"] = state.pop("1.bias")
    torch.save(state, paths[1])
    paths[2].write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="Ensemble") as caught:
        Ensemble.from_checkpoints(make_net, [*paths, tmp_path])
    advice = "make_model=lambda: Model().to(torch.float64) makes it so"
    lines = str(caught.value).splitlines()
    assert lines[0] == "Ensemble.from_checkpoints: what doesn't fit, in 4 files:"
    assert lines[2:6] == [
        f"  {paths[1]}: `1.bias` is missing",
        f"  {paths[1]}: `more` is unexpected, the model has no tensor of that name",
        f"  {paths[1]}: `0.weight` has shape (6, 5), the model's has (6, 4)",
        f"  {paths[1]}: `3.bias` is torch.float64, the model's is torch.float32; {advice}",
    ]
    assert lines[6].startswith(f"  {paths[2]} isn't the checkpoint of a model: ")
    assert lines[7].startswith(f"  {tmp_path} is a folder without model.safetensors, ")


def test_an_ensemble_isn_t_a_member(tmp_path):
    path = tmp_path / "ens.safetensors"
    Ensemble.build(make_net, 5).save(path)
    with pytest.raises(CheckpointError, match="it is an ensemble of 5 members; read it with Ens"):
        Ensemble.from_checkpoints(make_net, [path])


@pytest.mark.parametrize(
    ("paths", "error", "message"),
    [
        ("a.pt", TypeError, "paths is a list of files, one for each member, got 'a.pt'; for a"),
        ([], ValueError, "an ensemble has at least one member; no paths"),
        (["a.txt"], CheckpointError, "its name ends in '.txt', known are .safetensors, .pt, .pth"),
        (["missing.pt"], FileNotFoundError, "missing.pt"),
        (["missing.safetensors"], FileNotFoundError, "missing.safetensors"),
    ],
)
def test_paths_that_are_none(paths, error, message):
    with pytest.raises(error, match=message):
        Ensemble.from_checkpoints(make_net, paths)


# Out ----------------------------------------------------------------------------------------------


def test_a_saved_member_is_an_ordinary_state_dict(tmp_path):
    ens = Ensemble.build(Tied, 3)
    ens.save_member(2, tmp_path / "2.pt")
    ens.save_member(-1, tmp_path / "2.safetensors")
    plain, other = Tied(), Tied()
    plain.load_state_dict(torch.load(tmp_path / "2.pt"))
    load_model(other, tmp_path / "2.safetensors")  # tied tensors once, as this library has it
    assert_holds(ens[2:], [plain])
    assert_holds(ens[2:], [other])


def test_a_saved_member_takes_no_more_room_than_itself(tmp_path):
    ens = Ensemble.build(lambda: nn.Linear(100, 100), 50)
    ens.save_member(7, tmp_path / "7.pt")
    assert (tmp_path / "7.pt").stat().st_size < 100 * 101 * 4 + 5000


def test_members_that_cannot_be_saved(tmp_path):
    ens = Ensemble.build(lambda: nn.Linear(2, 2, dtype=torch.complex128), 2)
    with pytest.raises(ValueError, match=r"no room for `weight` is torch.complex128; `bias` is t"):
        ens.save_member(0, tmp_path / "0.safetensors")
    with pytest.raises(ValueError, match=r"is written to NAME.safetensors, .pt or .pth, got .*txt"):
        ens.save_member(0, tmp_path / "0.txt")
    with pytest.raises(IndexError, match="there are 2 members, 0 to 1"):
        ens.save_member(2, tmp_path / "0.pt")
    with pytest.raises(FileNotFoundError):
        ens.save_member(0, tmp_path / "missing" / "0.pt")
    assert list(tmp_path.iterdir()) == []


# Files that are alike -----------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch):
    """The files that are opened the usual way: those that are alike are not."""
    found = []

    def spy(path, select=None):
        found.append(str(path))
        return open_member(path, select)

    monkeypatch.setattr(gathering, "open_member", spy)
    return found


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_of_files_that_are_alike_one_is_looked_at(tmp_path, opened, suffix):
    models = [make_net() for _ in range(12)]
    paths = write_all(tmp_path, models, suffix)
    assert_holds(Ensemble.from_checkpoints(make_net, paths), models)
    assert set(opened) == {str(paths[0])}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_that_isn_t_alike_is_read_as_well(tmp_path, opened, suffix):
    models = [make_net() for _ in range(4)]
    paths = write_all(tmp_path, models, suffix)
    paths[2] = tmp_path / f"2.{'safetensors' if suffix == 'pt' else 'pt'}"
    write_all(tmp_path, models, paths[2].suffix[1:])
    other = dict(reversed(models[3].state_dict().items()))
    other["1.num_batches_tracked"] = other["1.num_batches_tracked"].clone()
    torch.save(other, paths[3]) if suffix == "pt" else save_file(other, paths[3], {"more": "facts"})
    assert_holds(Ensemble.from_checkpoints(make_net, paths), models)
    assert set(opened) == {str(paths[0]), str(paths[2]), str(paths[3])}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_pieces_of_one_storage_are_found(tmp_path, opened, suffix):
    whole = [torch.randn(2, 3, 4) for _ in range(5)]
    paths = [tmp_path / f"{i}.{suffix}" for i in range(5)]
    for path, both in zip(paths, whole, strict=True):
        state = {"0.weight": both[0], "1.weight": both[1]}
        if suffix == "pt":
            torch.save(state, path)
        else:
            save_file({name: t.clone() for name, t in state.items()}, path)

    def make():
        return nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False))

    ens = Ensemble.from_checkpoints(make, paths)
    assert torch.equal(ens.members.get_parameter("0.weight"), torch.stack(whole)[:, 0])
    assert torch.equal(ens.members.get_parameter("1.weight"), torch.stack(whole)[:, 1])
    assert set(opened) == {str(paths[0])}


def test_alike_but_in_another_order_in_memory(tmp_path):
    """A transposed tensor has the shape and not the order; the storage is that of the pickle."""
    models = [nn.Linear(3, 4) for _ in range(3)]
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    for path, model in zip(paths, models, strict=True):
        state = model.state_dict()
        torch.save({"weight": state["weight"].t().contiguous().t(), "bias": state["bias"]}, path)
    assert_holds(Ensemble.from_checkpoints(lambda: nn.Linear(3, 4), paths), models)


def test_rows_in_channels_last(tmp_path):
    models = [nn.Conv2d(3, 4, 3) for _ in range(3)]
    paths = write_all(tmp_path, models, "safetensors")

    def make():
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    ens = Ensemble.from_checkpoints(make, paths)
    assert_holds(ens, models)
    assert ens.members.weight[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("size", [-1, 700, 100])
def test_a_file_that_was_cut_off_is_told_with_the_others(tmp_path, models, suffix, size):
    paths = write_all(tmp_path, models, suffix)
    paths[2].write_bytes(paths[2].read_bytes()[:size])
    with pytest.raises(CheckpointError, match=f"{paths[2]} isn't the checkpoint of a model: "):
        Ensemble.from_checkpoints(make_net, paths)


def test_buffers_that_no_file_keeps_have_values_for_all(tmp_path, opened):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.register_buffer("scale", torch.arange(2.0), persistent=False)

    models = [Scaled() for _ in range(5)]
    paths = write_all(tmp_path, models)
    ens = Ensemble.from_checkpoints(Scaled, paths)
    assert torch.equal(ens.members.scale, torch.arange(2.0).expand(5, 2))
    assert set(opened) == {str(paths[0])}


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt()])
def test_an_error_in_one_thread_ends_the_other(tmp_path, monkeypatch, error):
    paths = write_all(tmp_path, [make_net()] * 100, "safetensors")
    read = []

    def failing(layout, path, rows, row):
        read.append(row)
        time.sleep(0.01)
        raise error

    monkeypatch.setattr(gathering, "fill", failing)
    with pytest.raises(type(error)):
        Ensemble.from_checkpoints(make_net, paths)
    assert len(read) < 10


def test_ctrl_c_ends_the_threads(tmp_path, monkeypatch):
    paths = write_all(tmp_path, [make_net()] * 200, "safetensors")
    read = []

    def slow(layout, path, rows, row):
        if not read:
            signal.raise_signal(signal.SIGINT)
        read.append(row)
        time.sleep(0.02)
        return True

    monkeypatch.setattr(gathering, "fill", slow)
    with pytest.raises(KeyboardInterrupt):
        Ensemble.from_checkpoints(make_net, paths)
    assert len(read) < 100


def test_what_does_not_fit_is_told_in_the_order_of_the_files(tmp_path):
    paths = write_all(tmp_path, [make_net() for _ in range(6)], "safetensors")
    for k in (5, 2, 3):
        save_file({"strange": torch.zeros(2)}, paths[k])
    with pytest.raises(CheckpointError, match="is unexpected") as info:
        Ensemble.from_checkpoints(make_net, paths)
    assert len(info.value.problems) == 3 * 10
    files = dict.fromkeys(line.partition(": `")[0] for line in info.value.problems)
    assert list(files) == [str(paths[k]) for k in (2, 3, 5)]
    assert str(info.value).endswith("... and 20 more")


def test_a_damaged_file_of_those_that_are_alike_is_what_it_is_alone(tmp_path):
    """Wherever a bit is wrong: both ways of reading give the same values, or the new one none."""
    models = [nn.Linear(2, 1) for _ in range(2)]
    paths = write_all(tmp_path, models, "pt")
    whole = paths[1].read_bytes()
    seen = set()
    for place in range(0, len(whole), 7):
        broken = bytearray(whole)
        broken[place] ^= 1 << place % 8
        paths[1].write_bytes(broken)
        found = [stacked_or_none(paths), stacked_or_none(paths[1:])]
        if found[1] is None:
            assert found[0] is None or torch.equal(found[0], values_of(models[1])), place
        else:
            assert found[0] is not None, place
            assert torch.equal(found[0], found[1]), place
        seen.add(tuple(value is None for value in found))
    assert {(True, True), (False, False)} <= seen


def values_of(model):
    return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


def stacked_or_none(paths):
    """The values of the last member; None if a file doesn't fit."""
    try:
        return values_of(Ensemble.from_checkpoints(lambda: nn.Linear(2, 1), paths)[-1])
    except CheckpointError:
        return None
