"""Runs a script as it stands, and writes what its training left: called in one process and many.

Called as ``python script.py FILE DTYPE``; the script's names ``ens`` and ``history`` are read.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

import torch


def main() -> None:
    torch.set_default_dtype(getattr(torch, sys.argv[2]))
    found = runpy.run_path(sys.argv[1], run_name="__main__")
    assert not torch.distributed.is_initialized(), "fit ends the group that it made"
    history = found["history"].to_dict()
    del history["seconds"]
    state = {name: tensor.tolist() for name, tensor in found["ens"].state_dict().items()}
    rank = os.environ.get("RANK", "0")
    (Path(os.environ["RESULTS"]) / rank).write_text(
        json.dumps({"history": history, "state": state})
    )


if __name__ == "__main__":
    main()
