"""Start a program on several ranks, and hear from each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATHS = [ROOT, ROOT / "src", ROOT / "examples", ROOT / "tests", ROOT / "tests" / "distributed"]


def run_ranks(
    program: str, *arguments: str, ranks: int, folder: Path, seconds: float = 100
) -> list[Any]:
    """Run ``program.py arguments`` below this folder by `torchrun`; what each rank wrote as JSON.

    A rank writes to the file ``folder / str(rank)``.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
        "OMP_NUM_THREADS": "1",
        "RESULTS": str(folder),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(Path(__file__).with_name(f"{program}.py"))]
    done = subprocess.run(
        [*command, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-8000:]}"
    return [json.loads((folder / str(rank)).read_text()) for rank in range(ranks)]


def run_checks(module: str, data: int, ranks: int, tmp_path_factory: Any) -> list[dict[str, str]]:
    """Run the ``CHECKS`` of a module on a mesh with so many replicas; errors by rank and name."""
    folder: Path = tmp_path_factory.mktemp(module)
    return run_ranks("worker", module, str(data), ranks=ranks, folder=folder)


def assert_passed(results: list[dict[str, str]], name: str) -> None:
    """Fail with what a check of this name raised on a rank."""
    for rank, found in enumerate(results):
        text = found.get(name, "not run: a check before it failed")
        assert not text, f"rank {rank}:\n{text}"
