"""`fit` on two ranks where nothing asks for the others' results: each may be an epoch ahead."""

from __future__ import annotations

import contextlib
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from checks_fit import OPTIONS, N, Training, _warns, assert_same, folder_of_all, network, same, x, y
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from one_process import equal, refused
from unisono import Ensemble, EnsembleError, distributed, fit, optim
from unisono.training import own_epochs
from unisono.training.own_epochs import OwnEpochs

PLAIN = {"validation": None, "metrics": None, "scheduler": ()}


@contextlib.contextmanager
def counted():
    """How often `go_ahead` and `take_back` with something to undo were called."""
    found = {"ahead": 0, "back": 0}
    ahead, back = OwnEpochs.go_ahead, OwnEpochs.take_back

    def go_ahead(self, *args):
        found["ahead"] += 1
        ahead(self, *args)

    def take_back(self):
        found["back"] += self._next is not None
        back(self)

    patches = {"go_ahead": go_ahead, "take_back": take_back}
    with mock.patch.multiple(OwnEpochs, **patches):
        yield found


def every_epoch_but_the_first_is_computed_ahead(mesh):
    def make():
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()

    for sampling in ("shared", "shuffled", "bootstrap", "folds"):
        with counted() as found:
            same(mesh, sampling=sampling, **PLAIN)
        assert found == {"ahead": OPTIONS["epochs"] - 1, "back": 0}, found
    # Dropout draws other numbers on each rank than in one process, but the same again.
    ahead = Training(mesh, make=make, lr=0.01, **PLAIN)
    with counted() as found, mock.patch.object(own_epochs, "_SHORT", 0.0):
        in_turn = Training(mesh, make=make, lr=0.01, **PLAIN)
    assert found["ahead"] == 0
    assert all(map(torch.equal, ahead.state().values(), in_turn.state().values()))
    assert ahead.curves() == in_turn.curves()


def no_epoch_is_ahead_of_what_others_have_to_say(mesh):
    step = torch.optim.lr_scheduler.StepLR
    loader = DataLoader(TensorDataset(x[:60], y[:60]), batch_size=16)
    quiet = {name: value for name, value in PLAIN.items() if name != "scheduler"}
    for options in (
        {**PLAIN, "validation": OPTIONS["validation"]},
        {**PLAIN, "callbacks": [lambda end: None]},
        {**PLAIN, "train": loader, "batch_size": None},
        {**PLAIN, "checkpoint": f"{folder_of_all()}/training"},
        {**quiet, "schedule": lambda adam: step(adam, 2)},
    ):
        with counted() as found:
            Training(mesh, epochs=3, **options)
        assert found == {"ahead": 0, "back": 0}, (options, found)
    with counted() as found:
        same(None, epochs=2, **PLAIN)
    assert found["ahead"] == 0


def an_epoch_ahead_is_taken_back_if_another_rank_loses_a_member(mesh):
    rates = [0.01] * N
    rates[5] = 50.0  # of rank 1; too high, so its losses grow without bound

    def make():
        return nn.Linear(4, 1).double()

    def train(place):
        ens = Ensemble.build(make, N, strategy="fused")
        optimizer = optim.SGD(ens, lr=rates, momentum=0.5)
        target = x.sum(1, keepdim=True)
        history = fit(
            ens,
            (x, target),
            loss=F.mse_loss,
            optimizer=optimizer,
            sampling="shuffled",
            mesh=place,
            epochs=40,
            batch_size=16,
            progress=False,
        )
        trained = Training.__new__(Training)
        trained.ens, trained.optimizer, trained.history = ens, optimizer, history
        return trained

    is_first = dist.get_rank() == 0
    with counted() as found, _warns("member 5") if is_first else contextlib.nullcontext():
        ranks = train(mesh)
    with _warns("member 5"):
        alone = train(None)
    assert ranks.history.stopped[5] == "not finite"
    epochs = int(np.isfinite(ranks.history.loss[:, 5]).sum())
    assert 1 < epochs < 39
    assert_same(ranks, alone)
    # The rank with the member knows it at once; the other one was ahead.
    assert found["back"] == int(is_first), found
    assert found["ahead"] == epochs + is_first, (found, epochs)


def an_epoch_ahead_is_taken_back_if_another_rank_fails(mesh):
    rank = dist.get_rank()
    steps = 4  # of an epoch of 60 rows
    kind, text = [(EnsembleError, "rank 1: OSError: no more"), (OSError, "no more")][rank]
    for make in (lambda: Ensemble.build(network, N), lambda: distributed.build(network, N, mesh)):
        seen = []

        def loss(outputs, targets, seen=seen):
            seen.append(1)
            if rank == 1 and len(seen) > 3 * steps + 2:
                raise OSError("no more")
            return F.cross_entropy(outputs, targets)

        def train(ens, loss, epochs):
            adam = optim.Adam(ens, lr=0.01)
            data = (x[:60], y[:60])
            options = {"loss": loss, "epochs": epochs, "batch_size": 16, "progress": False}
            place = mesh if len(ens) == N else "auto"
            return fit(ens, data, optimizer=adam, mesh=place, **options)

        broken, wanted = make(), make()
        is_whole = len(broken) == N
        with counted() as found, refused(kind, text):
            train(broken, loss, 8)
        assert found["back"] == int(rank == 0), found
        # A block at home ends where it stands: with the epoch that the other one failed in.
        train(wanted, F.cross_entropy, 3 if is_whole else 4)
        block = [slice(4), slice(4, N)][rank] if is_whole else slice(N)
        for name, tensor in broken.stacked_tensors().items():
            if is_whole or rank == 0:
                equal(tensor[block], wanted.stacked_tensors()[name][block])


CHECKS = [
    every_epoch_but_the_first_is_computed_ahead,
    no_epoch_is_ahead_of_what_others_have_to_say,
    an_epoch_ahead_is_taken_back_if_another_rank_loses_a_member,
    an_epoch_ahead_is_taken_back_if_another_rank_fails,
]
