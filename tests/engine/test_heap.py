"""Blocks that are free stay with the process, on the C library that adapts to a program."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
PROGRAM = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from unisono import Ensemble

torch.set_num_threads(1)

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def write():
    blocks = [torch.ones(5 << 18) for _ in range(3)]  # 5 MB each

Ensemble([torch.nn.Linear(2, 2) for _ in range(2)], strategy=sys.argv[2])(torch.ones(1, 2))
for _ in range(30):  # until the library has found places for them
    write()
before = pages()
for _ in range(10):
    write()
print(pages() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc adapts, others do not")
@pytest.mark.parametrize("strategy", ["auto", "fused"])
def test_after_a_first_call_memory_is_used_again(strategy: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(SOURCE), strategy]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert int(done.stdout) < 500, "25,000 pages are new if the library gives them back each time"
