"""Ranks that die, hang or lose their network: the job goes on, and ends as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from faults import Job, assert_equal, set_link, two_networks

from unisono import EnsembleError
from unisono.distributed.meeting import name_of_this_start

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    Job(folder).finish(100)
    return folder


def test_a_rank_that_is_killed_in_an_epoch(undisturbed, tmp_path):
    said = Job(tmp_path, fault="kill:1:5").finish(100)
    assert "exitcode: -9" in said
    assert_equal(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["kill:0:0", "write:0:5", "write:0:0", "end:0:0", "end:1:0"])
def test_a_rank_that_is_killed_somewhere_else(undisturbed, tmp_path, fault):
    said = Job(tmp_path, fault=fault).finish(100)
    assert "exitcode: -9" in said
    assert_equal(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", list(range(20)))
def test_a_rank_that_is_killed_at_a_random_moment(undisturbed, tmp_path, seed, record_property):
    draw = random.Random(seed)
    for attempt in range(10):
        job = Job(tmp_path / str(attempt), pause=0.3)
        # A quarter of them while the ranks start, the others between two checkpoints.
        mark = job.folder / ("pid-0" if seed % 4 == 0 else "training")
        while job.process.poll() is None and not mark.exists():
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 2 if seed % 4 == 0 else 12 * 0.3))
        workers = job.workers()
        if workers:
            record_property("checkpoint", (job.folder / "training").exists())
            os.kill(draw.choice(workers), signal.SIGKILL)
        said = job.finish(100)
        assert_equal(job.folder, undisturbed)
        if "exitcode: -9" in said:
            return
    pytest.fail("the job has always ended before")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs(undisturbed, tmp_path, rank):
    said = Job(tmp_path, fault=f"stop:{rank}:5", seconds=5).finish(150)
    assert f"fit: rank {1 - rank} has no answer from the others" in said
    assert "Timed out waiting 5000ms" in said
    assert "forcefully exiting via 9" in said  # half a minute later; a stopped process takes no 15
    assert_equal(tmp_path, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "line"), [("kill:1:5", "exitcode: -9"), ("stop:0:5", "5000ms")])
def test_a_replica_that_dies_or_hangs(tmp_path, fault, line):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    Job(undisturbed, environment={"DATA": "2"}).finish(100)
    said = Job(disturbed, fault=fault, seconds=5, environment={"DATA": "2"}).finish(150)
    assert "has no answer from the others" in said
    assert line in said
    assert_equal(disturbed, undisturbed)


@pytest.mark.slow
def test_a_machine_that_loses_its_network(undisturbed, tmp_path):
    with two_networks() as networks:
        jobs = [
            Job(
                tmp_path,
                seconds=5,
                pause=0.4,
                inside=inside,
                options=[
                    *("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=job"),
                    *("--rdzv-endpoint=10.99.0.1:29400", f"--rdzv-conf=is_host={1 - k}"),
                    f"--local-addr=10.99.0.{k + 1}",
                ],
                environment={"GLOO_SOCKET_IFNAME": f"link{k}"},
            )
            for k, inside in enumerate(networks)
        ]
        while not (tmp_path / "training").exists() and jobs[0].process.poll() is None:
            time.sleep(0.1)
        set_link(networks[1], "down")
        time.sleep(20)
        set_link(networks[1], "up")
        for rank, job in enumerate(jobs):
            assert f"fit: rank {rank} has no answer from the others" in job.finish(150)
    assert_equal(tmp_path, undisturbed)


# The name of a start, which ranks agree on in a store that dead ones have written to ------------


def start(store, world, missing=()):
    names, errors = {}, {}

    def rank(number):
        try:
            names[number] = name_of_this_start("fit", store, number, world, timedelta(seconds=1))
        except EnsembleError as error:
            errors[number] = str(error)

    threads = [threading.Thread(target=rank, args=(k,)) for k in range(world) if k not in missing]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names, errors


@pytest.fixture
def store():
    found = dist.HashStore()
    found.set_timeout(timedelta(seconds=1))
    return found


def test_each_start_has_a_name_of_its_own(store):
    for _ in range(3):
        names, errors = start(store, 4)
        assert not errors
        assert len(names) == 4
        assert len(set(names.values())) == 1
    again, _ = start(store, 4)
    assert set(again.values()).isdisjoint(names.values())


@pytest.mark.parametrize("missing", [1, 2])
def test_a_start_that_some_rank_never_came_to(store, missing):
    start(store, 3)
    _, errors = start(store, 3, missing={missing})
    assert errors[0] == (
        f"fit: rank {missing} has not come within 1 s; it has ended, or hangs, or it calls"
        f" something else first. Every rank runs the same script"
    )
    assert not start(store, 3)[1]


def test_a_start_without_its_first_rank(store):
    start(store, 2)
    _, errors = start(store, 2, missing={0})
    assert list(errors) == [1]
    assert errors[1].startswith("fit: rank 0 has not come within 1 s")
