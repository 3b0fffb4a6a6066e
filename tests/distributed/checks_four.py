"""Checks on four ranks, a mesh of two blocks with two replicas each."""

from __future__ import annotations

import tempfile

import members_over_ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn import functional as F

from benchmarks import communication
from one_process import batch, equal, make_model, whole
from unisono import Ensemble, combine, distributed, member_losses, optim
from unisono.distributed import planners

N = 5


def blocks_of_nine_members_are_as_even_as_can_be(mesh):
    names = ("member",)
    for line in (
        distributed.make_mesh(),
        dist.init_device_mesh("cpu", (4,), mesh_dim_names=names),
    ):
        part = distributed.build(make_model, 9, line, seed=3)
        assert (
            part.block.members == [range(3), range(3, 5), range(5, 7), range(7, 9)][dist.get_rank()]
        )
        ens, (x, _) = whole(9), batch()
        equal(distributed.gather(part(x), line), ens(x))
        equal(combine.probabilities(part(x), mesh=line), combine.probabilities(ens(x)))


def replicas_hold_the_same_members(mesh):
    part = distributed.shard(whole(N), mesh)
    block = part.block
    assert (block.index, block.replica) == divmod(dist.get_rank(), 2)
    assert (block.num_blocks, block.num_replicas) == (2, 2)
    equal(distributed.gather(part(batch()[0]), mesh), whole(N)(batch()[0]))


def _trained(ens, call, x, y, accumulate=1):
    optimizer = optim.Adam(ens, lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        for k in range(accumulate):
            rows = slice(k, None, accumulate)
            losses = member_losses(F.cross_entropy, call(x[rows]), y[rows])
            (losses.sum() / accumulate).backward()
        optimizer.step()


def five_steps_on_halves_of_the_batch_equal_one_process(mesh):
    x, y = batch()
    for shared in ((), "0.*"):
        ens = whole(N, shared=shared)
        part = distributed.shard(ens, mesh)
        own = part.block.replica
        model = distributed.Synchronised(part)
        _trained(ens, ens, x, y)
        _trained(part, model, x.chunk(2)[own], y.chunk(2)[own])
        for name, theirs in ens.members.named_parameters():
            rows = slice(None) if name in ens.shared else part.block.slice
            equal(part.members.get_parameter(name).detach(), theirs.detach()[rows])


def gradients_accumulate_with_and_without_no_sync(mesh):
    x, y = batch()
    ens = whole(N, shared="0.*")
    part = distributed.shard(ens, mesh)
    model = distributed.Synchronised(part)
    own = part.block.replica
    halves = [(x[rows], y[rows]) for rows in (slice(0, 8), slice(8, 12))]
    for xs, ys in halves:
        member_losses(F.cross_entropy, ens(xs), ys).sum().backward()
    for quiet in (False, True):
        part.zero_grad()
        for k, (xs, ys) in enumerate(halves):
            xs, ys = xs.chunk(2)[own], ys.chunk(2)[own]
            if quiet and k == 0:
                with model.no_sync():
                    member_losses(F.cross_entropy, model(xs), ys).sum().backward()
            else:
                member_losses(F.cross_entropy, model(xs), ys).sum().backward()
        for name, theirs in ens.members.named_parameters():
            rows = slice(None) if name in ens.shared else part.block.slice
            equal(part.members.get_parameter(name).grad, theirs.grad[rows])


def buffers_of_batch_norm_are_the_first_replicas(mesh):
    ens = Ensemble.build(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(), 4)
    part = distributed.shard(ens, mesh)
    model = distributed.Synchronised(part)
    x, _ = batch()
    for _ in range(2):
        ens(x.chunk(2)[0])
        model(x.chunk(2)[part.block.replica]).sum().backward()
    with torch.no_grad():
        model(x.chunk(2)[0])  # in which the buffers are sent
        ens(x.chunk(2)[0])
    equal(part.members[1].running_mean, ens.members[1].running_mean[part.block.slice])


def the_example_gives_what_one_process_gives(mesh):
    found, probabilities = members_over_ranks.train(mesh)
    ens = Ensemble.build(members_over_ranks.make_model, 8)
    x, y = members_over_ranks.load()
    optimizer = optim.Adam(ens, lr=members_over_ranks.RATES)
    order = torch.Generator().manual_seed(1)
    for _ in range(members_over_ranks.STEPS):
        rows = torch.randperm(800, generator=order)[: members_over_ranks.BATCH_SIZE]
        member_losses(F.cross_entropy, ens(x[rows]), y[rows]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = combine.probabilities(ens(x[800:]).detach())
    torch.testing.assert_close(probabilities, wanted, rtol=0, atol=1e-5)
    assert len(found.members["nll"]) == 8


def a_training_step_sends_the_gradients_once(mesh):
    sent, wanted = communication.of_a_step(mesh)
    assert sent == wanted > 0
    sent, wanted = communication.of_a_step(mesh, "0.*")
    assert sent == wanted > 0


def a_checkpoint_of_four_blocks_is_read_by_any_number(mesh):
    line = distributed.make_mesh()
    saved = distributed.build(make_model, 9, line, seed=3)
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    names = planners.stacked_names(saved)
    dcp.save(
        saved.state_dict(),
        checkpoint_id=folder[0],
        planner=planners.BlockSavePlanner(saved.block, names),
    )
    for other in (mesh, line):
        part = distributed.build(make_model, 9, other, seed=99)
        state = part.state_dict()
        dcp.load(
            state,
            checkpoint_id=folder[0],
            planner=planners.BlockLoadPlanner(part.block, names),
        )
        part.load_state_dict(state)
        for name, theirs in whole(9).state_dict().items():
            assert torch.equal(part.state_dict()[name], theirs[part.block.slice]), name
    state = Ensemble.build(make_model, 9, seed=99).state_dict()  # what plain programs read
    dcp.load(state, checkpoint_id=folder[0])
    equal(state, dict(whole(9).state_dict()))


def dropout_differs_between_replicas(mesh):
    part = distributed.shard(Ensemble.build(lambda: nn.Dropout(0.5), 4), mesh)
    mask = part(torch.ones(64))
    found = [torch.empty_like(mask) for _ in range(4)]
    dist.all_gather(found, mask)
    assert len({tuple(row.tolist()) for each in found for row in each}) == 8


CHECKS = [
    blocks_of_nine_members_are_as_even_as_can_be,
    replicas_hold_the_same_members,
    five_steps_on_halves_of_the_batch_equal_one_process,
    gradients_accumulate_with_and_without_no_sync,
    buffers_of_batch_norm_are_the_first_replicas,
    the_example_gives_what_one_process_gives,
    a_training_step_sends_the_gradients_once,
    a_checkpoint_of_four_blocks_is_read_by_any_number,
    dropout_differs_between_replicas,
]
