"""Checks on two ranks, each a block of members: what they compute equals one process."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from benchmarks import communication
from one_process import batch, equal, make_model, refused, whole
from unisono import (
    Ensemble,
    combine,
    distributed,
    evaluate,
    member_losses,
    optim,
    per_member,
    uncertainty,
)
from unisono.errors import EnsembleError

N = 5  # over two ranks: 3 and 2


def outputs_equal_one_process(mesh):
    ens, (x, _) = whole(N), batch()
    part = distributed.shard(ens, mesh)
    rank = mesh.get_local_rank()
    assert (part.block.first, len(part), part.block.num_members) == [(0, 3, 5), (3, 2, 5)][rank]
    equal(part(x), ens(x)[part.block.slice])
    equal(distributed.gather(part(x), mesh), ens(x))
    xs = torch.randn(N, 12, 4, dtype=torch.float64)
    equal(distributed.gather(part(per_member(xs[part.block.slice])), mesh), ens(per_member(xs)))


def build_makes_the_members_of_one_process(mesh):
    ens = whole(N)
    part = distributed.build(make_model, N, mesh, seed=3)
    block = part.block
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, ens.state_dict()[name][block.slice]), name


def gather_takes_any_tree(mesh):
    rank = mesh.get_local_rank()
    n = 3 - rank
    tree = {
        "a": (torch.full((n, 2), float(rank)), torch.full((n,), rank)),
        "b": [torch.full((n,), bool(rank)), "text", torch.full((n,), rank, dtype=torch.bfloat16)],
    }
    found = distributed.gather(tree, mesh)
    assert found["a"][0][:, 0].tolist() == found["a"][1].tolist() == [0, 0, 0, 1, 1]
    assert found["b"][0].tolist() == [False, False, False, True, True]
    assert found["b"][1] == "text"
    assert found["b"][2].dtype is torch.bfloat16


def gradients_through_gather_and_combine_are_those_of_one_process(mesh):
    ens, (x, y) = whole(N), batch()
    part = distributed.shard(ens, mesh)
    losses = {
        "gather": lambda e, mesh, all_: F.cross_entropy(all_(e(x)).mean(0), y),
        "probabilities": lambda e, mesh, _: (
            -combine.probabilities(e(x), mesh=mesh)[:, 1].log().sum()
        ),
        "classification": lambda e, mesh, _: sum(
            t.sum() for t in uncertainty.classification(e(x), mesh=mesh)[1:]
        ),
        "regression": lambda e, mesh, _: sum(
            t.square().sum() for t in uncertainty.regression(e(x), e(x).exp(), mesh=mesh)
        ),
        "median": lambda e, mesh, _: combine.median(e(x), mesh=mesh).square().sum(),
    }
    for name, loss in losses.items():
        ens.zero_grad()
        part.zero_grad()
        loss(ens, None, lambda t: t).backward()
        loss(part, mesh, lambda t: distributed.gather(t, mesh)).backward()
        for (key, mine), theirs in zip(part.named_parameters(), ens.parameters(), strict=True):
            wanted = theirs.grad[part.block.slice]
            assert wanted.abs().max() > 1e-6, (name, key)
            equal(mine.grad, wanted)


def five_steps_of_adam_equal_one_process(mesh):
    ens, (x, y) = whole(N), batch()
    part = distributed.shard(ens, mesh)
    rates = [1e-2 * (i + 1) for i in range(N)]
    for e, lr in ((ens, rates), (part, rates[part.block.slice])):
        optimizer = optim.Adam(e, lr=lr)
        for _ in range(5):
            optimizer.zero_grad()
            member_losses(F.cross_entropy, e(x), y).sum().backward()
            optimizer.step()
    for mine, theirs in zip(part.parameters(), ens.parameters(), strict=True):
        equal(mine.detach(), theirs.detach()[part.block.slice])


def combinations_equal_one_process(mesh):
    outputs = torch.randn(N, 6, 4, dtype=torch.float64)
    own = outputs[[slice(0, 3), slice(3, 5)][mesh.get_local_rank()]]
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 0.0], dtype=torch.float64)
    w = weights[[slice(0, 3), slice(3, 5)][mesh.get_local_rank()]]
    for fn in (combine.mean, combine.median, combine.probabilities):
        equal(fn(own, mesh=mesh), fn(outputs))
    equal(combine.weighted(own, w, mesh=mesh), combine.weighted(outputs, weights))
    equal(combine.weighted(own, w.tolist(), mesh=mesh), combine.weighted(outputs, weights))
    given, grads = weights.clone().requires_grad_(), w.clone().requires_grad_()
    combine.weighted(outputs, given).square().sum().backward()
    combine.weighted(own, grads, mesh=mesh).square().sum().backward()
    rows = [slice(0, 3), slice(3, 5)][mesh.get_local_rank()]
    equal(grads.grad, given.grad[rows])
    equal(combine.probabilities(own, 1, mesh=mesh), combine.probabilities(outputs, 1))
    half = own.half()
    assert combine.mean(half, mesh=mesh).dtype is torch.float16
    big = torch.full_like(half, 60000)  # their sum is no float16
    assert torch.equal(combine.mean(big, mesh=mesh), big[0])
    equal(
        combine.mean(torch.complex(own, own), mesh=mesh),
        combine.mean(torch.complex(outputs, outputs)),
    )


def votes_equal_one_process(mesh):
    outputs = torch.randint(0, 3, (N, 200, 4)).double()  # ties between classes and between members
    outputs[:, 0] = torch.nan  # all abstain
    outputs[2, 1:50] = torch.nan
    labels = torch.randint(-1, 5, (N, 200))
    rows = [slice(0, 3), slice(3, 5)][mesh.get_local_rank()]
    assert torch.equal(combine.vote(outputs[rows], mesh=mesh), combine.vote(outputs))
    assert torch.equal(combine.vote(outputs[rows].mT, 1, mesh=mesh), combine.vote(outputs.mT, 1))
    assert torch.equal(combine.vote(labels[rows], mesh=mesh), combine.vote(labels))


def uncertainties_equal_one_process(mesh):
    rows = [slice(0, 3), slice(3, 5)][mesh.get_local_rank()]
    logits = 3 * torch.randn(N, 20, 4, dtype=torch.float64)
    logits[0, 0, 1] = -torch.inf
    logits[:, 1, 2] = -torch.inf
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    for w in (None, weights):
        own = None if w is None else w[rows]
        equal(
            uncertainty.classification(logits[rows], weights=own, mesh=mesh),
            uncertainty.classification(logits, weights=w),
        )
        p = logits.softmax(-1)
        equal(
            uncertainty.classification(p[rows], given="probabilities", weights=own, mesh=mesh),
            uncertainty.classification(p, given="probabilities", weights=w),
        )
        mean, variance = 1e6 + logits[..., 0], logits[..., 3].exp()
        equal(
            uncertainty.regression(mean[rows], variance[rows], weights=own, mesh=mesh)[1:],
            uncertainty.regression(mean, variance, weights=w)[1:],
        )
        torch.testing.assert_close(
            uncertainty.regression(mean[rows], weights=own, mesh=mesh),
            uncertainty.regression(mean, weights=w),
        )


def evaluations_equal_one_process(mesh):
    ens, data = whole(N), batch(50)
    other = 9 * torch.randn(30, 4, dtype=torch.float64)
    part = distributed.shard(ens, mesh)
    for options in ({}, {"combine": lambda logits: logits.mean(0)}):
        found = evaluate(
            part,
            data,
            task="classification",
            out_of_distribution=other,
            mesh=mesh,
            batch_size=16,
            **options,
        )
        wanted = evaluate(
            ens, data, task="classification", out_of_distribution=other, batch_size=16, **options
        )
        _equal_evaluations(found, wanted)
    y = data[0] @ torch.ones(4, 3, dtype=torch.float64)
    for convert in (None, lambda out: (out, out.exp())):
        found = evaluate(part, (data[0], y), task="regression", convert=convert, mesh=mesh)
        _equal_evaluations(found, evaluate(ens, (data[0], y), task="regression", convert=convert))
    weights = [0.1, 0.2, 0.3, 0.4, 0.5]
    ens.combination.set(weights=weights, temperatures=[1, 2, 1, 2, 3], pooled_temperature=0.7)
    part = distributed.shard(ens, mesh)
    _equal_evaluations(
        evaluate(part, data, task="classification", mesh=mesh),
        evaluate(ens, data, task="classification"),
        atol=1e-7,  # the weights are kept in float32
    )
    equal(
        part.combination.probabilities(part(data[0]), mesh=mesh),
        ens.combination.probabilities(ens(data[0])),
    )


def _equal_evaluations(found, wanted, atol=1e-12):
    mine, theirs = found.to_dict(), wanted.to_dict()
    assert mine.pop("task") == theirs.pop("task")
    assert (mine["out_of_distribution"] is None) == (theirs["out_of_distribution"] is None)
    if mine["out_of_distribution"] is None or mine["out_of_distribution"]["members"] is None:
        mine["out_of_distribution"], theirs["out_of_distribution"] = {}, {}
    assert len(found.members["nll"] if "nll" in found.members else found.members["rmse"]) == N
    torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)


def dropout_differs_between_ranks_and_leaves_the_generators_in_step(mesh):
    ens = Ensemble.build(lambda: nn.Dropout(0.5), 4)
    part = distributed.shard(ens, mesh)
    x = torch.ones(64)
    masks = distributed.gather(part(x), mesh)
    assert len({tuple(mask.tolist()) for mask in masks}) == 4
    again = distributed.gather(part(x), mesh)
    assert not torch.equal(masks, again)
    after = torch.rand(3)
    assert torch.equal(*distributed.gather(after.unsqueeze(0), mesh))
    before = torch.get_rng_state()
    part.eval()(x)
    assert torch.equal(before, torch.get_rng_state()), "a call that draws nothing changes nothing"
    same = distributed.shard(Ensemble.build(lambda: nn.Dropout(0.5), 4, seed=0), mesh)
    same.randomness = "same"
    masks = distributed.gather(same(x), mesh)
    assert torch.equal(masks[0], masks[3])


def shared_parameters_have_the_sum_of_all_gradients(mesh):
    x, y = batch()
    ens = whole(N, shared="0.*")
    for part in (
        distributed.shard(ens, mesh),
        distributed.build(make_model, N, mesh, seed=3, shared="0.*"),
    ):
        ens_, model = whole(N, shared="0.*"), distributed.Synchronised(part)
        for e, call in ((ens_, ens_), (part, model)):
            optimizer = optim.Adam(e, lr=1e-2)
            for _ in range(5):
                optimizer.zero_grad()
                member_losses(F.cross_entropy, call(x), y).sum().backward()
                optimizer.step()
        for name, theirs in ens_.members.named_parameters():
            rows = slice(None) if name in ens.shared else part.block.slice
            equal(part.members.get_parameter(name).detach(), theirs.detach()[rows])


def a_loss_by_run_is_synchronised_too(mesh):
    x, _ = batch()
    ens = whole(N, shared="0.*")
    part = distributed.shard(ens, mesh)
    model = distributed.Synchronised(part)
    ens.run(lambda m, x: m(x).square().sum(), x).sum().backward()
    model.run(lambda m, x: m(x).square().sum(), x).sum().backward()
    equal(part.members[0].weight.grad, ens.members[0].weight.grad)


def copies_keep_their_place(mesh):
    import copy
    import pickle

    part = distributed.shard(whole(N), mesh)
    assert copy.deepcopy(part).block is part.block
    thawed = pickle.loads(pickle.dumps(part)).block
    assert (thawed.first, thawed.mesh) == (part.block.first, None)
    assert part[[0]].block is None


def bytes_are_those_of_the_answers(mesh):
    for name, (sent, wanted) in communication.of_answers(mesh).items():
        assert sent == wanted, name
    assert communication.of_a_step(mesh) == (0, 0)


def a_rank_that_stays_away_is_told_after_the_timeout(mesh):
    # The last check: a group of gloo is of no use after an error.
    quick = distributed.make_mesh(timeout=timedelta(seconds=1))
    if mesh.get_local_rank() == 0:
        with refused(RuntimeError, "imed out"):
            combine.mean(torch.zeros(2, 3), mesh=quick)
    dist.barrier()


# What is refused, on every rank and without a wait ------------------------------------------------


def fewer_members_than_ranks(mesh):
    text = "at least one member, but there are 1 members for 2 ranks"
    with refused(ValueError, "distributed.shard", text, "make_mesh(data=2)"):
        distributed.shard(whole(1), mesh)
    with refused(ValueError, "distributed.build", text):
        distributed.build(make_model, 1, mesh)


def ranks_with_different_ensembles(mesh):
    rank = mesh.get_local_rank()
    with refused(EnsembleError, "1 of 2 differ", "rank 1, number of members: 6; rank 0 has 5"):
        distributed.shard(whole(5 + rank), mesh)
    wide = [4, 9][rank]
    text = "rank 1, `weight`: shape (2, 9), torch.float32, requires_grad=True; rank 0 has shape"
    with refused(EnsembleError, text, "torchrun --nproc-per-node"):
        distributed.shard(Ensemble.build(lambda: nn.Linear(wide, 2), 4), mesh)
    with refused(EnsembleError, "distributed.build", text):
        distributed.build(lambda: nn.Linear(wide, 2), 4, mesh)
    with refused(EnsembleError, "rank 1, model: Tanh(); rank 0 has ReLU()"):
        distributed.shard(Ensemble.build([nn.ReLU, nn.Tanh][rank], 4), mesh)
    with refused(EnsembleError, "rank 1, values of members.weight: checksum"):
        distributed.shard(Ensemble.build(lambda: nn.Linear(3, 2), 4, seed=rank), mesh)
    with refused(EnsembleError, "rank 1, seed: 1; rank 0 has 0"):
        distributed.build(make_model, 4, mesh, seed=rank)


def an_error_on_one_rank_is_raised_on_all(mesh):
    rank = mesh.get_local_rank()

    def broken():
        if rank == 1:
            raise OSError("no such file")
        return make_model()

    kind, text = [(EnsembleError, "rank 1: OSError: no such file"), (OSError, "no such file")][rank]
    with refused(kind, text):
        distributed.build(broken, 4, mesh)
    outputs = torch.zeros(2, 3)
    weights = [[1.0, 2.0], [1.0, -1.0]][rank]
    text = "combine.weighted: weights are finite and not negative, but weights[1] is -1.0"
    with refused(ValueError, text, *(["on rank 1"] if rank == 0 else [])):
        combine.weighted(outputs, weights, mesh=mesh)
    with refused(ValueError, "the weights of the members on all ranks sum to zero"):
        combine.weighted(outputs, [0.0, 0.0], mesh=mesh)
    p = torch.full((2, 3), [1 / 3, 0.5][rank])
    with refused(ValueError, "uncertainty.classification: probabilities are at least 0"):
        uncertainty.classification(p, given="probabilities", mesh=mesh)
    with refused(ValueError, "variances are at least 0"):
        uncertainty.regression(outputs, outputs - rank, mesh=mesh)


def outputs_that_do_not_fit_each_other(mesh):
    rank = mesh.get_local_rank()
    text = "rank 1, the output: shape (n, 4), torch.float32; rank 0 has shape (n, 3), torch.float32"
    with refused(ValueError, "distributed.gather", text):
        distributed.gather(torch.zeros(2, 3 + rank), mesh)


def meshes_that_do_not_fit(mesh):
    ens = whole(4)
    other = dist.init_device_mesh("cpu", (2,), mesh_dim_names=("batch",))
    with refused(ValueError, "distributed.shard", "('batch',)", "make_mesh"):
        distributed.shard(ens, other)
    with refused(ValueError, "combine.mean", "('batch',)"):
        combine.mean(torch.zeros(2, 3), mesh=other)
    names = ("member", "data", "pipeline")
    with refused(ValueError, "of shape (2, 1, 1)"):
        distributed.shard(ens, dist.init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=names))
    one = dist.DeviceMesh("cpu", [mesh.get_rank()], mesh_dim_names=("member",))
    with refused(ValueError, "it has every rank, but it has 1 of 2"):
        distributed.shard(ens, one)
    with refused(TypeError, "mesh is a torch.distributed.DeviceMesh, got int"):
        distributed.shard(ens, 2)
    with refused(ValueError, "data is the number of replicas", "there are 2 ranks and data=3"):
        distributed.make_mesh(data=3)
    with refused(ValueError, "is a block already"):
        distributed.shard(distributed.shard(ens, mesh), mesh)
    with refused(TypeError, "part is the block of one rank, got a whole ensemble"):
        distributed.Synchronised(ens)


CHECKS = [
    outputs_equal_one_process,
    build_makes_the_members_of_one_process,
    gather_takes_any_tree,
    gradients_through_gather_and_combine_are_those_of_one_process,
    five_steps_of_adam_equal_one_process,
    combinations_equal_one_process,
    votes_equal_one_process,
    uncertainties_equal_one_process,
    evaluations_equal_one_process,
    dropout_differs_between_ranks_and_leaves_the_generators_in_step,
    shared_parameters_have_the_sum_of_all_gradients,
    a_loss_by_run_is_synchronised_too,
    copies_keep_their_place,
    fewer_members_than_ranks,
    ranks_with_different_ensembles,
    an_error_on_one_rank_is_raised_on_all,
    outputs_that_do_not_fit_each_other,
    meshes_that_do_not_fit,
    bytes_are_those_of_the_answers,
    a_rank_that_stays_away_is_told_after_the_timeout,
]
