"""`fit` on two ranks, each with a block of the members, against one process."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.collective_bytes import CollectiveBytes
from one_process import equal, refused
from unisono import Ensemble, EnsembleError, EnsembleWarning, distributed, fit, optim
from unisono.training import exchange

N = 7
RATES = [0.1, 0.05, 0.02, 0.01, 0.005, 1e-5, 1e-3]


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)).double()


def rows(n=80):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    noise = torch.randn(n, dtype=torch.float64, generator=generator)
    return x, (x[:, 0] + noise > 0).long()


x, y = rows()
OPTIONS = {
    "loss": F.cross_entropy,
    "epochs": 8,
    "batch_size": 16,
    "validation": (x[60:], y[60:]),
    "metrics": {"accuracy": lambda out, target: (out.argmax(1) == target).double().mean()},
    "seed": 3,
    "progress": False,
}


class Training:
    """One training; the same with and without other ranks."""

    def __init__(self, mesh, *, make=network, schedule=None, lr=RATES, strategy="fused", **options):
        self.ens = Ensemble.build(make, N, strategy=strategy)
        self.optimizer = optim.AdamW(self.ens, lr=lr, weight_decay=0.1)
        step = torch.optim.lr_scheduler.StepLR
        schedulers = [schedule(self.optimizer)] if schedule else [step(self.optimizer, 2, 0.9)]
        self.history = fit(
            self.ens,
            **{
                "train": (x[:60], y[:60]),
                "optimizer": self.optimizer,
                "scheduler": schedulers,
                "mesh": mesh,
                **OPTIONS,
                **options,
            },
        )

    def state(self):
        found = dict(self.ens.state_dict().items())
        for k, (_, kept) in enumerate(self.optimizer.state_dict()["state"].items()):
            found |= {f"{k}.{name}": tensor for name, tensor in kept.items()}
        return found

    def curves(self):
        found = self.history.to_dict()
        return {name: values for name, values in found.items() if name != "seconds"}


def same(mesh, **options):
    found, wanted = Training(mesh, **options), Training(None, **options)
    assert_same(found, wanted)
    return found


def assert_same(found, wanted):
    equal(found.state(), wanted.state())
    mine, theirs = found.curves(), wanted.curves()
    assert mine.pop("stopped") == theirs.pop("stopped")
    held = mine.pop("held_out"), theirs.pop("held_out")
    assert held[0] == held[1]
    for each in (mine, theirs):
        each |= {name: _numbers(values) for name, values in each.items() if name[-7:] != "metrics"}
        for kind in ("metrics", "combined_metrics"):
            each[kind] = {name: _numbers(values) for name, values in each[kind].items()}
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10, equal_nan=True)


def _numbers(values):
    return torch.from_numpy(np.array(values, dtype=float))


# The same numbers -----------------------------------------------------------------------------


def every_sampling_trains_the_members_of_one_process(mesh):
    for sampling in ("shared", "shuffled", "bootstrap", "folds"):
        same(mesh, sampling=sampling, epochs=4)


def members_stop_early_and_the_rest_is_spread_over_the_ranks(mesh):
    found = same(mesh, sampling="shuffled", patience=2, max_grad_norm=[1.0] * N, epochs=20)
    assert found.history.stopped.count("patience") >= 4
    # Members 2 and 3 move after their best epoch: their best weights come along.
    same(mesh, lr=[0.3] * 4 + [1.0] * 3, sampling="shuffled", patience=2, epochs=20)


def a_rank_may_have_no_member_left(mesh):
    rates = [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1e-3]
    found = same(mesh, lr=rates, patience=1, epochs=20, combine=lambda outputs: outputs.mean(0))
    assert found.history.stopped.count("") <= 1


def schedulers_by_steps_and_by_plateaus(mesh):
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    same(mesh, scheduler_every="step", accumulate=2, patience=3)
    same(mesh, schedule=lambda optimizer: plateau(optimizer, patience=0, threshold=0.1))


def callbacks_see_and_change_all_members_on_all_ranks(mesh):
    seen = []

    def exploit(end):
        seen.append([float(p.detach().sum()) for p in end.ensemble.parameters()])
        losses = end.history.validation_loss[-1]
        best, worst = int(losses.argmin()), int(losses.argmax())
        end.ensemble.copy_(best, worst)
        end.optimizer.param_groups[worst]["lr"] *= 1.3
        return end.epoch == 5

    same(mesh, callbacks=[exploit])
    half = len(seen) // 2
    assert half == 6
    equal(torch.tensor(seen[:half]), torch.tensor(seen[half:]))
    # One rank that has enough is enough.
    rank = dist.get_rank()
    found = Training(mesh, callbacks=[lambda end: rank == 1 and end.epoch == 2])
    assert found.history.epochs == 3


def a_member_that_explodes_is_frozen(mesh):
    def explode(end):
        if end.epoch == 1:
            end.ensemble.members[0].weight.data[5] = float("inf")

    warned = contextlib.nullcontext()
    for place in (mesh, None):
        is_told = place is None or dist.get_rank() == 0
        warned = _warns("member 5") if is_told else contextlib.nullcontext()
        with warned:
            found = Training(place, callbacks=[explode], sampling="shuffled")
        assert found.history.stopped[5] == "not finite"
    with _warns("member 5") if dist.get_rank() == 0 else contextlib.nullcontext():
        ranks = Training(mesh, callbacks=[explode], sampling="shuffled")
    assert_same(ranks, found)


@contextlib.contextmanager
def _warns(text):
    import warnings

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", EnsembleWarning)
        yield
    assert any(text in str(each.message) for each in found), [str(w.message) for w in found]


def loaders_give_all_ranks_the_same_rows(mesh):
    data = TensorDataset(x[:60], y[:60])
    for sampling in ("shared", "bootstrap"):
        same(mesh, train=DataLoader(data, batch_size=16, shuffle=True), sampling=sampling, epochs=3)
    for place in (mesh, None):
        own = torch.Generator().manual_seed(5)
        loader = DataLoader(data, batch_size=16, shuffle=True, generator=own)
        found = Training(place, train=loader, batch_size=None, patience=2, epochs=10)
        if place is mesh:
            first, state = found, own.get_state()
    assert_same(first, found)
    assert torch.equal(state, own.get_state())


def losses_of_every_kind_are_combined_by_sums(mesh):
    targets = x.sum(1, keepdim=True)
    events = (targets > 0).double()

    def one():
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    for loss, target in ((F.mse_loss, targets), (F.binary_cross_entropy_with_logits, events)):
        same(
            mesh,
            make=one,
            loss=loss,
            train=(x[:60], target[:60]),
            validation=(x[60:], target[60:]),
            metrics={},
            patience=2,
        )


def what_members_share_is_trained_together(mesh):
    for place in (mesh, None):
        ens = Ensemble.build(network, N, shared="0.*", strategy="fused")
        optimizer = optim.Adam(ens, lr=0.01)
        data = (x[:60], y[:60])
        history = fit(ens, data, optimizer=optimizer, mesh=place, **OPTIONS)
        found = [history.loss, history.validation_loss, *ens.state_dict().values()]
        if place is mesh:
            first = found
    for mine, theirs in zip(first, found, strict=True):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(theirs))


def dropout_draws_apart_and_repeats(mesh):
    def make():
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()

    before = torch.get_rng_state()
    first, second = (Training(mesh, make=make, lr=0.01) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(map(torch.equal, first.state().values(), second.state().values()))


def a_block_of_its_own_stays_on_its_rank(mesh):
    whole = Training(None, patience=2)
    part = distributed.build(network, N, mesh, strategy="fused")
    own = part.block.slice
    optimizer = optim.AdamW(part, lr=RATES[own], weight_decay=0.1)
    history = fit(
        part,
        (x[:60], y[:60]),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9),
        patience=2,
        **OPTIONS,
    )
    for name, theirs in whole.ens.members.named_parameters():
        equal(part.members.get_parameter(name).detach(), theirs.detach()[own])
    torch.testing.assert_close(
        torch.from_numpy(history.validation_loss),
        torch.from_numpy(whole.history.validation_loss),
        equal_nan=True,
    )
    assert history.stopped == whole.history.stopped
    assert len(part) == part.block.size


def a_training_of_blocks_is_resumed_by_blocks_and_by_one_process(mesh):
    def run(part, file=None, callbacks=(), **options):
        own = slice(None) if part.block is None else part.block.slice
        optimizer = optim.AdamW(part, lr=RATES[own], weight_decay=0.1)
        chosen = {**OPTIONS, "patience": 2, "max_grad_norm": 1.0, **options}
        return fit(
            part,
            (x[:60], y[:60]),
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9),
            checkpoint=file,
            resume=file is not None,
            callbacks=callbacks,
            **chosen,
        )

    def interrupt(end):
        if end.epoch == 4:
            raise Interrupted

    def block():
        return distributed.build(network, N, mesh, strategy="fused")

    wanted, history = Ensemble.build(network, N, strategy="fused"), {}
    history[None] = run(wanted, mesh=None, max_grad_norm=1.0)
    file = Path(folder_of_all(), "training.safetensors")
    with contextlib.suppress(Interrupted):
        run(block(), file, [interrupt])
    dist.barrier()
    copy = file.with_name("copy.safetensors")
    if dist.get_rank() == 0:
        copy.write_bytes(file.read_bytes())
    dist.barrier()
    part = block()
    history["blocks"] = run(part, file)
    for name, theirs in wanted.members.named_parameters():
        equal(part.members.get_parameter(name).detach(), theirs.detach()[part.block.slice])
    _assert_same_losses(history["blocks"], history[None])
    if dist.get_rank() == 0:
        one = Ensemble.build(network, N, strategy="fused")
        _assert_same_losses(run(one, copy, mesh=None), history[None])
        equal(dict(one.state_dict()), dict(wanted.state_dict()))
    dist.barrier()


def _assert_same_losses(found, wanted):
    for mine, theirs in ((found.loss, wanted.loss), (found.lr, wanted.lr)):
        mine, theirs = torch.from_numpy(mine), torch.from_numpy(theirs)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10, equal_nan=True)


# Checkpoints ----------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def a_resumed_training_is_the_uninterrupted_one(mesh):
    folder = folder_of_all()

    def interrupt(end):
        if end.epoch == 4:
            raise Interrupted

    options = {"patience": 2, "sampling": "bootstrap", "epochs": 9}
    for place, others in ((mesh, [mesh, None]), (None, [mesh])):
        wanted = Training(place, **options)
        for k, other in enumerate(others):
            file = Path(folder, f"{place is None}{k}.safetensors")
            if place is not None or dist.get_rank() == 0:
                with contextlib.suppress(Interrupted):
                    Training(place, checkpoint=file, callbacks=[interrupt], **options)
            dist.barrier()
            if other is None and dist.get_rank() == 1:
                continue
            found = Training(other, checkpoint=file, resume=True, **options)
            assert_same(found, wanted)
            if other is place:
                mine, theirs = found.state(), wanted.state()
                assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == []
    dist.barrier()


def equal_ranks_send_no_weights(mesh):
    def broadcast(make):
        ens = Ensemble.build(network, N, seed=0)
        with torch.no_grad():
            make(ens)
        with CollectiveBytes() as seen:
            fit(ens, (x, y), optimizer=optim.Adam(ens, lr=0.01), mesh=mesh, **OPTIONS)
        # The names of ranks and the like are broadcast, too, as parts of larger objects.
        return seen.sent["broadcast"], ens

    def differ_by_rounding(ens):
        if dist.get_rank() == 1:
            ens.members.get_parameter("0.weight").mul_(1 + 1e-12)

    equal_ranks, wanted = broadcast(lambda ens: None)
    rounded, found = broadcast(differ_by_rounding)
    assert rounded - equal_ranks == wanted.members.get_parameter("0.weight").nbytes
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def rows_of_every_dtype_arrive_bit_by_bit(mesh):
    dtypes = [torch.bool, torch.float64, torch.bfloat16, torch.complex64, torch.int64]
    shapes = [(3,), (), (2, 3), (5, 0), (1,)]
    generator = torch.Generator().manual_seed(0)
    wanted = [
        torch.randn(N, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for dtype in dtypes
        for shape in shapes
    ]
    wanted.append(torch.randn(N, 4, 3, generator=generator).transpose(1, 2))
    for held in ([[0, 2, 3, 6], [1, 5, 4]], [[3], [5]], [[2, 4], []]):
        for size in (exchange._MESSAGE, 40):
            _assert_rows_arrive(wanted, held, size, mesh.get_group("member"))


def _assert_rows_arrive(wanted, held, message, group):
    rank, sent = dist.get_rank(), sorted(itertools.chain(*held))
    own = [torch.zeros_like(tensor) for tensor in wanted]
    for tensor, want in zip(own, wanted, strict=True):
        tensor[held[rank]] = want[held[rank]]
    before, exchange._MESSAGE = exchange._MESSAGE, message
    try:
        with CollectiveBytes() as seen:
            exchange.gather_members(own, held, rank, group)
    finally:
        exchange._MESSAGE = before
    for tensor, want in zip(own, wanted, strict=True):
        assert torch.equal(tensor[sent], want[sent])
        assert int(tensor.count_nonzero()) == int(want[sent].count_nonzero())
    assert seen.total == max(map(len, held)) * sum(want[0].nbytes for want in wanted)


def folder_of_all():
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    return folder[0]


# What is refused, on every rank ---------------------------------------------------------------


def ranks_with_different_data_or_settings(mesh):
    rank = dist.get_rank()
    other = x[:60] + rank
    with refused(EnsembleError, "fit: all ranks run one program", "rank 1, values of train[0]"):
        Training(mesh, train=(other, y[:60]))
    with refused(EnsembleError, "rank 1, seed: 1; rank 0 has 0"):
        Training(mesh, seed=rank)
    with refused(EnsembleError, "rank 1: `0.weight` has other values than on rank 0", "seed=0"):
        ens = Ensemble.build(network, N, seed=rank)
        fit(ens, (x, y), optimizer=optim.Adam(ens), mesh=mesh, **OPTIONS)
    with refused(EnsembleError, "values of the param groups"):
        Training(mesh, lr=0.1 + rank)


def an_error_on_one_rank_is_raised_on_all(mesh):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, k):
            if dist.get_rank() == 1 and k == 50:
                raise OSError("no row 50")
            return x[k], y[k]

    rank = dist.get_rank()
    kind, text = [(EnsembleError, "rank 1: OSError: no row 50"), (OSError, "no row 50")][rank]
    with refused(kind, text):
        Training(mesh, train=Broken())
    with refused(kind, text):
        Training(mesh, validation=Broken())

    def fail(end):
        if dist.get_rank() == 1:
            raise OSError("no row 50")

    with refused(kind, text):
        Training(mesh, callbacks=[fail])
    text = "epochs is a whole number"
    kind, text = [(EnsembleError, f"rank 1: ValueError: fit: {text}"), (ValueError, text)][rank]
    with refused(kind, text):
        Training(mesh, epochs=[3, 0][rank])


def what_ranks_cannot_share(mesh):
    sampler = torch.utils.data.DistributedSampler(TensorDataset(x, y))
    loader = DataLoader(TensorDataset(x, y), batch_size=16, sampler=sampler)
    with refused(ValueError, "the DataLoader has a DistributedSampler"):
        Training(mesh, train=loader, batch_size=None)
    ens = Ensemble.build(network, N, shared="0.*")
    text = "all members train `0.weight`, `0.bias` together, on all ranks"
    with refused(ValueError, text):
        adam = optim.Adam(ens, lr=0.01)
        fit(ens, (x, y), optimizer=adam, patience=2, mesh=mesh, **OPTIONS)
    with refused(ValueError, "fit: every rank along the axis 'member' has at least one member"):
        one = Ensemble.build(network, 1)
        fit(one, (x, y), optimizer=optim.Adam(one, lr=0.01), mesh=mesh, **OPTIONS)


CHECKS = [
    every_sampling_trains_the_members_of_one_process,
    members_stop_early_and_the_rest_is_spread_over_the_ranks,
    a_rank_may_have_no_member_left,
    schedulers_by_steps_and_by_plateaus,
    callbacks_see_and_change_all_members_on_all_ranks,
    a_member_that_explodes_is_frozen,
    loaders_give_all_ranks_the_same_rows,
    losses_of_every_kind_are_combined_by_sums,
    what_members_share_is_trained_together,
    dropout_draws_apart_and_repeats,
    a_block_of_its_own_stays_on_its_rank,
    a_training_of_blocks_is_resumed_by_blocks_and_by_one_process,
    a_resumed_training_is_the_uninterrupted_one,
    equal_ranks_send_no_weights,
    rows_of_every_dtype_arrive_bit_by_bit,
    ranks_with_different_data_or_settings,
    an_error_on_one_rank_is_raised_on_all,
    what_ranks_cannot_share,
]
