"""Checkpoints of blocks on four ranks: saved on four, loaded on any number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from checks_fit import folder_of_all
from torch import nn
from torch.nn import functional as F

from one_process import batch, equal, make_model, refused, whole
from unisono import CheckpointError, Ensemble, EnsembleError, distributed, member_losses, optim

N = 9
RATES = torch.logspace(-3, -1, N).tolist()


def _step(ens, optimizer):
    x, y = batch()
    member_losses(F.cross_entropy, ens(x), y).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _adam(ens):
    rows = slice(None) if ens.block is None else ens.block.slice
    return optim.Adam(ens, lr=RATES[rows], betas=(0.8, 0.99))


def _equal_rows(part, wanted):
    rows = slice(None) if part.block is None else part.block.slice
    for name, theirs in wanted.state_dict().items():
        is_shared = name.removeprefix("members.") in wanted.shared
        equal(part.state_dict()[name], theirs if is_shared else theirs[rows])


def saved_on_four_and_loaded_on_any_number(mesh):
    line = distributed.make_mesh()
    for shared in ((), "0.*"):
        ens = whole(N, shared=shared)
        part = distributed.build(make_model, N, line, seed=3, shared=shared, strategy="fused")
        call = distributed.Synchronised(part)
        optimizers = [optim.Adam(ens, lr=0.01), optim.Adam(part, lr=0.01)]
        if not shared:
            optimizers = [_adam(ens), _adam(part)]
        for model, optimizer in ((ens, optimizers[0]), (call, optimizers[1])):
            _step(model, optimizer)
        folder = Path(folder_of_all(), "step-1")
        for _ in range(2):  # the second replaces the first
            distributed.save(part, folder, optimizers[1])
            dist.barrier()
            assert len(list(folder.glob("data-*"))) == 1
        found = [distributed.load(folder, make_model, place) for place in (line, mesh, None)]
        _step(ens, optimizers[0])
        for other in found:
            optimizer = optim.Adam(other, lr=0.5) if shared else _adam(other)
            optimizer.param_groups[0]["lr"] = 7.0
            distributed.load_optimizer(folder, other, optimizer)
            _step(other if other.block is None else distributed.Synchronised(other), optimizer)
            _equal_rows(other, ens)
            assert other.shared == ens.shared


def options_and_combinations_come_along(mesh):
    ens = whole(N).eval()
    ens.combination.set(weights=list(range(1, N + 1)), pooled_temperature=0.7)
    ens.members[0].bias.requires_grad_(False)
    part = distributed.shard(ens, distributed.make_mesh())
    folder = folder_of_all()
    distributed.save(part, folder)
    for place in (mesh, None):
        found = distributed.load(folder, make_model, place)
        _equal_rows_with_single(found, ens)
        assert not found.training
        assert found.strategy == "fused"
        assert not found.members[0].bias.requires_grad


def _equal_rows_with_single(part, wanted):
    rows = slice(None) if part.block is None else part.block.slice
    mine = part.state_dict()
    for name, theirs in wanted.state_dict().items():
        equal(mine[name], theirs[rows] if theirs.dim() else theirs)


def one_file_becomes_shards_and_back(mesh):
    folder = Path(folder_of_all())
    ens, line = whole(N), distributed.make_mesh()
    if dist.get_rank() == 0:
        ens.save(folder / "one.safetensors")
    dist.barrier()
    part = distributed.load(folder / "one.safetensors", make_model, line)
    _equal_rows(part, ens)
    distributed.save(part, folder / "shards")
    if dist.get_rank() == 0:
        distributed.load(folder / "shards", make_model).save(folder / "back.safetensors")
    dist.barrier()
    _equal_rows(Ensemble.load(folder / "back.safetensors", make_model), ens)


def a_save_in_the_background_has_the_values_of_its_beginning(mesh):
    part = distributed.build(make_model, N, distributed.make_mesh(), seed=3)
    folder, optimizer = folder_of_all(), _adam(part)
    saving = distributed.async_save(part, folder, optimizer)
    _step(part, optimizer)
    saving.wait()
    assert saving.done()
    dist.barrier()
    _equal_rows(distributed.load(folder, make_model, mesh), whole(N))


def nothing_in_the_folder_is_a_pickle(mesh):
    folder = Path(folder_of_all())
    distributed.save(distributed.build(make_model, N, mesh), folder, None)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    # A folder that claims to hold Python objects where tensors are expected is refused as well.
    assert ".metadata" not in {path.name for path in files}


def what_is_missing_is_one_error_on_every_rank(mesh):
    line = distributed.make_mesh()
    folder = Path(folder_of_all())
    distributed.save(distributed.build(make_model, N, line), folder)
    index = json.loads((folder / "unisono.json").read_text())
    shards = sorted((folder / index["data"]).glob("*.safetensors"))
    assert len(shards) == 4
    for change, text in ((Path.unlink, "missing, was"), (_cut, "100 bytes, was")):
        broken = Path(folder_of_all())
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.copytree(folder, broken, dirs_exist_ok=True)
            change(broken / index["data"] / shards[2].name)
        dist.barrier()
        for place in (line, mesh, None):
            with refused(CheckpointError, "distributed.load: not all shards", text, shards[2].name):
                distributed.load(broken, make_model, place)
        dist.barrier()
    with refused(CheckpointError, "holds no ensemble: there is no unisono.json in it"):
        distributed.load(folder_of_all(), make_model, line)
    with refused(CheckpointError, "another architecture"):
        distributed.load(folder, lambda: nn.Linear(4, 3).double(), line)
    part = distributed.load(folder, make_model, line)
    with refused(CheckpointError, "9 members with no optimizer, but this is Adam of 9"):
        distributed.load_optimizer(folder, part, _adam(part))
    rank = dist.get_rank()
    kind = FileNotFoundError if rank == 1 else EnsembleError
    with refused(kind, "no such" if rank == 1 else "rank 1: FileNotFoundError: no such"):
        distributed.load(folder, _missing if rank == 1 else make_model, line)


def _missing():
    raise FileNotFoundError("no such")


def _cut(path):
    path.write_bytes(path.read_bytes()[:100])


CHECKS = [
    saved_on_four_and_loaded_on_any_number,
    options_and_combinations_come_along,
    one_file_becomes_shards_and_back,
    a_save_in_the_background_has_the_values_of_its_beginning,
    nothing_in_the_folder_is_a_pickle,
    what_is_missing_is_one_error_on_every_rank,
]
