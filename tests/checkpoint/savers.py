"""A process whose children save over a file, for tests that kill them: a fork takes no time.

It reads lines, words between tabs. "start", a call, which ensemble, a step and a folder: it forks a
child and writes its process id. "wait" and "poll": it writes how the child ended.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from unisono import Ensemble

CALLS = {"save": "ens.safetensors", "pickle": "member.pt", "member": "member.safetensors"}
# What touches the disk. A call is cut off before each of them.
_STEPS = frozenset(("open", "write", "fsync", "fchmod", "flock", "replace", "unlink", "close"))


def make_net() -> nn.Module:
    """A model that takes some milliseconds to write."""
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.Linear(512, 256))


def make_pair() -> dict[str, Ensemble]:
    """Two ensembles, the same in every process."""
    return {which: Ensemble.build(make_net, 2, seed=seed) for which, seed in (("a", 0), ("b", 9))}


def save(call: str, ens: Ensemble, folder: Path) -> None:
    """Make one of `CALLS`."""
    path = folder / CALLS[call]
    if call == "save":
        ens.save(path)
    else:
        ens.save_member(0, path)


def die_before(number: int) -> None:
    """End this process, as SIGKILL does, before step ``number`` of those that touch the disk."""
    count = 0

    def look(_: FrameType, event: str, called: Any) -> None:
        nonlocal count
        if event == "c_call" and called.__name__ in _STEPS:
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.setprofile(look)


def child(call: str, ens: Ensemble, event: int, folder: Path) -> int:
    """Save, and return the exit code."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        name, _, times = call.partition("*")
        if event >= 0:
            die_before(event)
        for _ in range(int(times or 1)):
            save(name, ens, folder)
        sys.setprofile(None)
        return 0
    except KeyboardInterrupt:
        return 130
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what comes before a child is ready for it
    torch.set_num_threads(1)
    pair, process = make_pair(), 0
    print("ready", flush=True)
    for line in sys.stdin:
        command, *arguments = line.rstrip("\n").split("\t")
        if command == "start":
            call, which, event, folder = arguments
            process = os.fork()
            if process == 0:
                os._exit(child(call, pair[which], int(event), Path(folder)))
            print(process, flush=True)
        else:  # only now: until then the number is no other process's
            ended, status = os.waitpid(process, os.WNOHANG if command == "poll" else 0)
            print(status if ended else "running", flush=True)


if __name__ == "__main__":
    main()
