"""The model of benchmarks/scaling.py on two ranks."""

from __future__ import annotations

import time

import torch.distributed as dist

from benchmarks.scaling import CASES, LINKS, measure, step_of
from benchmarks.scaling_model import step_seconds

FACTOR = 3  # that the model may be wrong by, on a machine that others use, too
LINK = LINKS["10 Gbit/s, 50 us"]


def a_step_of_two_ranks_takes_what_the_model_says(mesh):
    case, members = CASES[1], 2000
    for rank in range(2):  # each alone, while the other waits
        if rank == dist.get_rank():
            measured = measure(case, (500, 2000), rounds=9)
        dist.barrier()
    own = step_of(case, members // 2)
    seconds = []
    for _ in range(12):
        dist.barrier()
        start = time.perf_counter()
        own()
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    found = sorted(seconds[3:])[4]
    wanted = step_seconds(members, 2, case.network, measured, LINK)
    assert wanted / FACTOR < found < wanted * FACTOR, (found, wanted, measured)


CHECKS = [a_step_of_two_ranks_takes_what_the_model_says]
