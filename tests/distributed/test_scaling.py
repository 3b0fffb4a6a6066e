"""The model that docs/scaling.md has its tables from, and the benchmarks beside it."""

from __future__ import annotations

import checks_scaling
import pytest
import torch

from benchmarks import two_processes
from benchmarks.scaling import CASES, MEMBERS, RANKS, replica_table, table
from benchmarks.scaling_model import (
    Link,
    Network,
    compute_seconds,
    gather_seconds,
    members_of,
    memory_bytes,
    shown_bytes,
    shown_seconds,
    step_seconds,
    sum_seconds,
)
from launch import assert_passed, run_checks
from unisono import Ensemble, member_losses, optim

MEASURED = {1: 1e-3, 10: 2e-3, 100: 10e-3}
NETWORK = Network(parameters=1000, activations=50, features=8, rows=16, steps=100)
NO_LINK = Link(float("inf"), 0.0)
SLOW, FAST = Link(1e8, 1e-4), Link(1e10, 1e-5)


def step(members, blocks, link=SLOW, **options):
    return step_seconds(members, blocks, NETWORK, MEASURED, link, **options)


def test_measured_numbers_of_members_give_what_was_measured():
    for count, seconds in MEASURED.items():
        assert compute_seconds(count, MEASURED) == pytest.approx(seconds)


def test_between_two_numbers_it_is_on_the_line_and_above_all_in_proportion():
    assert compute_seconds(55, MEASURED) == pytest.approx(6e-3)
    assert compute_seconds(1000, MEASURED) == pytest.approx(100e-3)


def test_more_members_are_never_cheaper_even_where_noise_says_so():
    noisy = {1: 5e-3, 10: 4e-3, 100: 20e-3, 1000: 19e-3}
    found = [compute_seconds(n, noisy) for n in range(1, 3000)]
    assert found == sorted(found)


def test_without_others_a_step_is_that_of_one_rank():
    for members in (1, 7, 100, 5000):
        assert step(members, 1) == compute_seconds(members, MEASURED)


def test_with_a_perfect_link_it_is_that_of_the_largest_block():
    assert step(1000, 16, NO_LINK) == compute_seconds(63, MEASURED)
    assert step(1000, 16, NO_LINK, replicas=4) == compute_seconds(63, MEASURED)


@pytest.mark.parametrize("members", [10, 1000, 10**6])
def test_more_members_take_longer_and_a_better_link_takes_less(members):
    for blocks in (1, 4, 10):
        assert step(members, blocks) <= step(10 * members, blocks)
        assert step(members, blocks, FAST) <= step(members, blocks, SLOW)
        assert step(members, blocks) < step(members, blocks, replicas=2)


def test_more_ranks_help_as_long_as_they_have_enough_to_do():
    seconds = [step(10**6, blocks) for blocks in (1, 2, 4, 8, 16, 32, 64)]
    assert seconds == sorted(seconds, reverse=True)
    speedup = seconds[0] / seconds[-1]
    assert 60 < speedup <= 64


def test_collectives_of_one_rank_are_free_and_of_many_reach_twice_the_bytes():
    assert sum_seconds(1e6, 1, SLOW) == gather_seconds(1e6, 1, SLOW) == 0
    many = sum_seconds(1e9, 10_000, Link(1e8, 0.0))
    assert many == pytest.approx(2 * 1e9 / 1e8, rel=1e-3)
    assert gather_seconds(10, 3, Link(1.0, 0.5)) == 2 * 10.5


def test_memory_is_divided_by_the_ranks():
    assert memory_bytes(1000, 10, NETWORK) == 16 * 1000 * 100 + 4 * 100 * 16 * 50 + 4 * 16 * 8
    assert members_of(9, 4) == 3
    whole = memory_bytes(1000, 10, NETWORK, whole=True)
    assert whole == memory_bytes(1000, 10, NETWORK) + 12 * 1000 * 1000
    assert memory_bytes(1000, 1, NETWORK, whole=True) == memory_bytes(1000, 1, NETWORK)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_memory_is_that_of_the_tensors(case):
    members = 3
    ens = Ensemble.build(case.make, members, strategy="fused")
    optimizer = optim.Adam(ens, lr=1e-3)
    x, y = torch.randn(case.rows, case.sizes[0]), torch.randint(10, (case.rows,))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = ens(x)
        losses = member_losses(torch.nn.functional.cross_entropy, outputs, y)
    losses.sum().backward()
    optimizer.step()
    own = [p.data_ptr() for p in ens.parameters()]
    activations = sum(size for at, size in kept.items() if at not in own)
    moments = [s for p in optimizer.state.values() for s in p.values() if s.dim() > 1]
    state = sum(2 * p.numel() for p in ens.parameters()) + sum(s.numel() for s in moments)
    found = memory_bytes(members, 1, case.network)
    assert found == pytest.approx(4 * state + activations, rel=0.1)


def test_sizes_and_times_as_text():
    sizes = [shown_bytes(size) for size in (0, 999, 1500, 2e9)]
    assert sizes == ["0 B", "999 B", "1.5 kB", "2 GB"]
    seconds = [shown_seconds(each) for each in (3e-6, 0.05, 2.0, 600)]
    assert seconds == ["3 us", "50 ms", "2 s", "10 min"]


def test_tables_have_every_case():
    lines = table(CASES[0], MEASURED, SLOW).splitlines()
    assert len(lines) == 2 + len(MEMBERS)
    assert lines[2].count("| -") == sum(ranks > MEMBERS[0] for ranks in RANKS)
    assert all(line.count("|") == len(RANKS) + 2 for line in lines)
    assert replica_table(CASES[0]).count("\n") == 5


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_take_what_the_model_says(tmp_path_factory):
    found = run_checks("checks_scaling", 1, 2, tmp_path_factory)
    assert_passed(found, checks_scaling.CHECKS[0].__name__)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_what_one_trains():
    times = two_processes.measured("tiny", epochs=1, rounds=1)
    assert [len(own) for own in times.values()] == [1, 1]
