"""One rank: runs the checks of a group, one after another, and writes what came of each."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from unisono import distributed


def main() -> None:
    module, data = sys.argv[1], int(sys.argv[2])
    warnings.simplefilter("error")
    mesh = distributed.make_mesh(data=data, timeout=timedelta(seconds=30))
    checks = importlib.import_module(module).CHECKS
    found: dict[str, str] = {}
    for check in checks:
        torch.manual_seed(0)
        try:
            check(mesh)
        except BaseException:  # that of torch.distributed.checkpoint is no Exception
            found[check.__name__] = traceback.format_exc()
        else:
            found[check.__name__] = ""
        (Path(os.environ["RESULTS"]) / str(dist.get_rank())).write_text(json.dumps(found))
        if any_failed(found[check.__name__]):
            break  # ranks are no longer in step, and the next check would wait for nothing
    dist.destroy_process_group()


def any_failed(text: str) -> bool:
    flag = torch.tensor(int(bool(text)))
    dist.all_reduce(flag)
    return bool(flag)


if __name__ == "__main__":
    main()
