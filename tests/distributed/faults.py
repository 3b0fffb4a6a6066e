"""Jobs of `torchrun` that something happens to, and networks that can be cut."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from launch import PATHS

PROGRAM = Path(__file__).with_name("fault_program.py")
WORKERS = "--nproc-per-node=2"


class Job:
    """A job of two ranks, of which one may go through a fault; see `fault_program`.

    Args:
        folder: Where it keeps its checkpoint and its results.
        fault: What happens to which rank in which epoch.
        seconds: How long ranks wait for each other.
        pause: Seconds by which an epoch takes longer, so that something can happen in it.
        inside: The command that starts `torchrun`, if it is to start somewhere else.
        options: Of `torchrun`.
        environment: What is added to it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fault: str = "none:0:0",
        seconds: float = 30,
        pause: float = 0,
        inside: Sequence[str] = (),
        options: Sequence[str] = ("--standalone", WORKERS),
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        paths = os.pathsep.join(map(str, PATHS))
        settings = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OUT": str(folder)}
        settings |= {"FAULT": fault, "SECONDS": str(seconds), "PAUSE": str(pause)}
        command = [*inside, sys.executable, "-m", "torch.distributed.run", "--max-restarts", "3"]
        self._log = open(folder / f"log-{time.time_ns()}", "w+")
        self.process = subprocess.Popen(
            [*command, *options, str(PROGRAM)],
            env={**os.environ, **settings, **(environment or {})},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def workers(self) -> list[int]:
        """The processes that are its ranks now."""
        pid = self.process.pid
        try:
            return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        except FileNotFoundError:  # it has ended
            return []

    def finish(self, seconds: float) -> str:
        """Wait until it has ended well, no longer than that; what it said."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            for pid in self.workers():
                os.kill(pid, 9)
            self.process.kill()
            code = self.process.wait()
        self._log.seek(0)
        said = self._log.read()
        self._log.close()
        assert code == 0, f"exit code {code}:\n{said[-8000:]}"
        return said


def assert_equal(folder: Path, undisturbed: Path) -> None:
    """Fail unless both jobs have the same curves, weights and optimizers, bit by bit."""
    for rank in "01":
        found, wanted = (torch.load(where / rank) for where in (folder, undisturbed))
        assert found.pop("curves") == wanted.pop("curves")
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    left = sorted(path.name for path in folder.iterdir() if path.name[:3] not in ("log", "pid"))
    assert [name for name in left if name != "fault"] == ["0", "1", "training"]


@contextmanager
def two_networks() -> Iterator[tuple[list[str], list[str]]]:
    """Commands that start something in one of two networks, which see each other and nothing else.

    They have the addresses 10.99.0.1 on ``link0`` and 10.99.0.2 on ``link1``. Skips the test where
    they can't be made.
    """
    holders = []
    try:
        for _ in range(2):
            holders.append(subprocess.Popen(["unshare", "--net", "sleep", "600"]))
        insides = [["nsenter", "--target", str(holder.pid), "--net"] for holder in holders]
        time.sleep(1)  # until they have left our own network
        own = os.readlink("/proc/self/ns/net")
        if any(os.readlink(f"/proc/{h.pid}/ns/net") == own for h in holders):
            pytest.skip("makes no network namespaces")
        link = "ip link add link0 type veth peer name link1 netns".split()
        _run(*insides[0], *link, str(holders[1].pid))
        for k, inside in enumerate(insides):
            _run(*inside, *f"ip addr add 10.99.0.{k + 1}/24 dev link{k}".split())
            for name in ("lo", f"link{k}"):
                _run(*inside, *f"ip link set {name} up".split())
        yield insides[0], insides[1]
    except FileNotFoundError as error:
        pytest.skip(f"needs {error.filename}")
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


def set_link(inside: Sequence[str], state: str) -> None:
    """Set the link of the second network ``"up"`` or ``"down"``."""
    _run(*inside, *f"ip link set link1 {state}".split())


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")
