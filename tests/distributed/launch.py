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
