"""A process that checks models within limits of time and memory; if it crashes, only it ends."""

from __future__ import annotations

import multiprocessing
import resource
import time
import traceback
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

MODELS_PER_PROCESS = 12  # memory that a library keeps is given back now and then


class Worker:
    """Checks one model after another in a process of its own.

    Args:
        seconds: Limit for one model.
        gigabytes: Limit for the process.
        threads: Threads of torch.
    """

    def __init__(self, seconds: float, gigabytes: float, threads: int) -> None:
        self._limits = (seconds, gigabytes, threads)
        self._process: Any = None
        self._checked = 0

    def check(self, name: str) -> dict[str, Any]:
        """The finding on one model, whatever happens."""
        if self._process is None or self._checked >= MODELS_PER_PROCESS:
            self.stop()
            self._start()
        self._checked += 1
        start = time.monotonic()
        self._connection.send(name)
        try:
            if self._connection.poll(self._limits[0]):
                finding = self._connection.recv()
            else:
                finding = _failed(f"took more than {self._limits[0]:.0f} s", "not finished")
                self._kill()
        except (EOFError, ConnectionError):
            self._process.join()
            finding = _failed(f"the process died: exit code {self._process.exitcode}", "error")
            self._process = None
        return {"name": name, **finding, "seconds": round(time.monotonic() - start, 1)}

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._kill()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *self._limits[1:]))
        self._process.start()
        theirs.close()
        self._checked = 0

    def _kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process = None


def _serve(connection: Connection, gigabytes: float, threads: int) -> None:
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import torch

    from benchmarks.zoo.catalogue import recipe
    from benchmarks.zoo.check import check

    torch.set_num_threads(threads)
    while True:
        name = connection.recv()
        try:
            finding = asdict(check(recipe(name)))
        except Exception:
            finding = _failed(traceback.format_exc(), "error")
        connection.send(finding)


def _failed(failure: str, how: str) -> dict[str, Any]:
    return {
        "equal": False,
        "how": how,
        "dtype": "",
        "shape": "",
        "errors": {},
        "reasons": [],
        "failure": failure,
        "note": "",
    }
