"""`fit` on four ranks: as four blocks, and as two blocks of two replicas."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
import torch.distributed as dist
from checks_fit import OPTIONS, Interrupted, N, Training, assert_same, folder_of_all, same, x, y
from torch import nn
from torch.nn import functional as F

from one_process import equal, refused
from unisono import Ensemble, EnsembleError, distributed, fit, optim


def replicas_split_minibatches_of_any_size(mesh):
    same(mesh, sampling="shuffled", epochs=3, batch_size=15, max_grad_norm=1.0, patience=2)
    same(mesh, sampling="shared", epochs=2, batch_size=7, accumulate=2)
    same(mesh, sampling="bootstrap", epochs=1, batch_size=1)  # fewer rows than replicas


def four_blocks_with_early_stopping(mesh):
    line = distributed.make_mesh()
    found = same(line, sampling="shuffled", patience=2, epochs=20)
    assert found.history.stopped.count("patience") >= 4
    found = same(line, lr=[3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1e-3], patience=1, epochs=20)
    assert found.history.stopped.count("") <= 1  # so that ranks had nothing left to do


def parameters_of_all_are_summed_over_all(mesh):
    for place in (mesh, None):
        ens = Ensemble.build(shallow, N, shared="0.*", strategy="fused")
        options = {**OPTIONS, "batch_size": 15, "mesh": place}
        history = fit(ens, (x[:60], y[:60]), optimizer=optim.Adam(ens, lr=0.01), **options)
        found = [torch.from_numpy(history.loss), *ens.state_dict().values()]
        if place is mesh:
            first = found
    equal(first, found)


def shallow():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def a_parameter_without_a_gradient_stays(mesh):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(x)

    same(mesh, make=lambda: Half().double(), epochs=2)


def buffers_of_replicas_are_equal_afterwards(mesh):
    def make():
        return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).double()

    found = Training(mesh, make=make, epochs=2)
    for tensor in found.ens.state_dict().values():
        first = tensor.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, tensor)


def a_replica_that_fails_is_heard_of_at_once(mesh):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, k):
            if dist.get_rank() == 2 and k == 50:
                raise OSError("no row 50")
            return x[k], y[k]

    rank = dist.get_rank()
    kind, text = (OSError, "no row 50") if rank == 2 else (EnsembleError, "rank 2: OSError: no row")
    for place in (mesh, distributed.make_mesh()):
        with refused(kind, text):
            Training(place, train=Broken())
    ens = Ensemble.build(shallow, N, shared="0.*")
    with refused(kind, text):
        adam = optim.Adam(ens, lr=0.01)
        fit(ens, Broken(), optimizer=adam, mesh=mesh, **OPTIONS)


def replicas_with_other_numbers_of_minibatches(mesh):
    class Short(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(list(zip(x, y, strict=True))[: 60 if dist.get_rank() else 20])

    loader = torch.utils.data.DataLoader(Short(), batch_size=16)
    text = "rank 0: it has fewer minibatches in an epoch than another rank"
    with refused(EnsembleError, text, "rank 1: it has more minibatches"):
        Training(mesh, train=loader, batch_size=None)
    with refused(EnsembleError, "in epoch 0 the ranks saw 20, 60, 60, 60 rows"):
        Training(distributed.make_mesh(), train=loader, batch_size=None)


def saved_on_four_ranks_and_resumed_on_any_number(mesh):
    line = distributed.make_mesh()
    options = {"patience": 2, "sampling": "bootstrap", "epochs": 9}

    def interrupt(end):
        if end.epoch == 4:
            raise Interrupted

    file = Path(folder_of_all(), "training.safetensors")
    wanted = Training(None, **options)
    with contextlib.suppress(Interrupted):
        Training(line, checkpoint=file, callbacks=[interrupt], **options)
    saved = file.read_bytes()
    for place in (line, mesh, None):
        dist.barrier()
        if dist.get_rank() == 0:
            file.write_bytes(saved)
        dist.barrier()
        if place is not None or dist.get_rank() == 0:
            assert_same(Training(place, checkpoint=file, resume=True, **options), wanted)
    dist.barrier()


def mse_of_blocks_and_replicas(mesh):
    targets = x.sum(1, keepdim=True)

    def make():
        return nn.Linear(4, 1).double()

    data = {"train": (x[:60], targets[:60]), "validation": (x[60:], targets[60:])}
    same(mesh, make=make, loss=F.mse_loss, metrics={}, **data)


CHECKS = [
    replicas_split_minibatches_of_any_size,
    four_blocks_with_early_stopping,
    parameters_of_all_are_summed_over_all,
    a_parameter_without_a_gradient_stays,
    buffers_of_replicas_are_equal_afterwards,
    a_replica_that_fails_is_heard_of_at_once,
    replicas_with_other_numbers_of_minibatches,
    saved_on_four_ranks_and_resumed_on_any_number,
    mse_of_blocks_and_replicas,
]
