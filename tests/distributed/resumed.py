"""A training on any number of ranks, interrupted or taken up; and shards, saved or loaded.

Called as ``python resumed.py interrupt|resume|whole FOLDER``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist
from checks_fit import Interrupted, N, Training, network

from unisono import Ensemble, distributed


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    file = None if what == "whole" else folder / "training.safetensors"

    def interrupt(end: object) -> None:
        if what == "interrupt" and len(end.history.loss) == 5:
            raise Interrupted

    found = None
    with contextlib.suppress(Interrupted):
        found = Training(
            "auto",
            sampling="bootstrap",
            patience=3,
            checkpoint=file,
            resume=what == "resume",
            callbacks=[interrupt],
        )
    if what != "whole":
        shards(what, folder / "shards")
    left = {} if found is None else {"history": found.curves(), "state": lists(found.state())}
    (Path(os.environ["RESULTS"]) / os.environ.get("RANK", "0")).write_text(json.dumps(left))


def shards(what: str, folder: Path) -> None:
    mesh = distributed.make_mesh() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
    if what == "interrupt":
        distributed.save(distributed.build(network, N, mesh), folder)
    else:
        part = distributed.load(folder, network, mesh)
        rows = slice(None) if part.block is None else part.block.slice
        for name, tensor in Ensemble.build(network, N).state_dict().items():
            assert tensor[rows].equal(part.state_dict()[name]), name
    if mesh is not None:
        dist.destroy_process_group()


def lists(state: dict) -> dict:
    return {name: tensor.tolist() for name, tensor in state.items()}


if __name__ == "__main__":
    main()
