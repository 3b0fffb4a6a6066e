"""Saving that is killed, interrupted, out of room, or done twice at once: old or new, no less."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from savers import CALLS, make_net, make_pair, save
from unisono import Ensemble
from unisono.files import replacing

pytestmark = pytest.mark.skipif(os.name == "nt", reason="kills and forks as POSIX does")
HERE = Path(__file__).parent


class Saver:
    """A process that has imported everything, and forks children that save."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, HERE / "savers.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._line() == "ready"

    def start(self, folder: Path, call: str, which: str, step: int = -1) -> int:
        """Fork a child that saves; its process id. It ends itself before a step, if told which."""
        return int(self._ask(f"start\t{call}\t{which}\t{step}\t{folder}"))

    def wait(self) -> int:
        """How the child ended: its exit code, or the negative number of a signal."""
        return os.waitstatus_to_exitcode(int(self._ask("wait")))

    def poll(self) -> int | None:
        """Likewise; None if it is running."""
        found = self._ask("poll")
        return None if found == "running" else os.waitstatus_to_exitcode(int(found))

    def save(self, folder: Path, call: str, which: str) -> float:
        """Save, and return how long it took."""
        begun = time.monotonic()
        self.start(folder, call, which)
        assert self.wait() == 0
        return time.monotonic() - begun

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _ask(self, text: str) -> str:
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> str:
        return self.process.stdout.readline().strip()


@pytest.fixture(scope="module")
def saver():
    one = Saver()
    yield one
    one.close()


@pytest.fixture(scope="module")
def other_saver():
    one = Saver()
    yield one
    one.close()


@pytest.fixture(scope="module")
def pair():
    return {which: state_of(ens) for which, ens in make_pair().items()}


def state_of(ens):
    return {name: tensor.detach().clone() for name, tensor in ens.state_dict().items()}


def content(path, call, pair):
    """Which of the two ensembles a file holds, whole and bitwise."""
    if call == "save":
        found = state_of(Ensemble.load(path, make_net))
    else:
        found = state_of(Ensemble.from_checkpoints(make_net, [path]))
    equal = [
        which
        for which, state in pair.items()
        if all(torch.equal(value, state[name][: len(value)]) for name, value in found.items())
    ]
    assert len(equal) == 1, "neither old nor new"
    return equal[0]


def left_behind(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


# Killed -------------------------------------------------------------------------------------------


def kill_at_random(saver, folder, pair, kills, in_the_midst=0):
    """SIGKILL at random moments of saving over a file, so many of them while it is half done."""
    path, dice = folder / CALLS["save"], random.Random(0)
    saver.save(folder, "save", "a")
    length = max(saver.save(folder, "save", "b") for _ in range(3))
    before, half_done, count = "b", 0, 0
    while count < kills or half_done < in_the_midst:
        count += 1
        assert count <= 10 * kills, f"{half_done} of {count} kills found the save half done"
        new = dice.choice("ab")
        process = saver.start(folder, "save", new)
        time.sleep(dice.random() * length)
        os.kill(process, signal.SIGKILL)
        saver.wait()
        half_done += len(left_behind(folder)) == 1
        found = content(path, "save", pair)
        assert found in (before, new)
        before = found
    saver.save(folder, "save", "a")
    assert left_behind(folder) == [], "the next save sweeps"


def test_killed_at_random_moments(saver, tmp_path, pair):
    kill_at_random(saver, tmp_path, pair, 10)  # it asserts; so few may all miss the writing


@pytest.mark.slow
def test_killed_at_200_random_moments(saver, tmp_path, pair):
    kill_at_random(saver, tmp_path, pair, 200, in_the_midst=50)


@pytest.mark.parametrize("call", CALLS)
def test_killed_before_every_step(saver, tmp_path, pair, call):
    """Whatever touches the disk: opening, writing, syncing, renaming, removing, locking."""
    path = tmp_path / CALLS[call]
    saver.save(tmp_path, call, "a")
    found, half_done = [], 0
    while True:
        saver.start(tmp_path, call, "b", step=len(found))
        if saver.wait() == 0:
            break
        found.append(content(path, call, pair))
        half_done += len(left_behind(tmp_path)) == 1
    assert found[0] == "a", "killed before anything happened"
    assert found == sorted(found), "new once, and from then on"
    assert half_done >= 5
    assert content(path, call, pair) == "b"
    assert left_behind(tmp_path) == []


# Interrupted --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_leaves_nothing_behind(saver, tmp_path, pair, call):
    path, dice = tmp_path / CALLS[call], random.Random(0)
    saver.save(tmp_path, call, "a")
    length = saver.save(tmp_path, call, "a")
    ended = []
    while len(ended) < 8 or (130 not in ended and len(ended) < 100):
        process = saver.start(tmp_path, call, dice.choice("ab"))
        time.sleep(dice.random() * length)
        os.kill(process, signal.SIGINT)
        ended.append(saver.wait())
        assert left_behind(tmp_path) == []
        content(path, call, pair)
    assert set(ended) == {0, 130} or set(ended) == {130}


def test_an_error_while_writing_leaves_nothing_behind(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def fail():
        with replacing(path) as new:
            new.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# Two at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_two_processes_save_to_one_path_and_a_third_loads(saver, other_saver, tmp_path, pair, call):
    path = tmp_path / CALLS[call]
    saver.save(tmp_path, call, "a")
    saver.start(tmp_path, f"{call}*15", "a")
    other_saver.start(tmp_path, f"{call}*15", "b")
    found, ended = set(), [None, None]
    while None in ended:
        found.add(content(path, call, pair))
        for k, one in enumerate((saver, other_saver)):
            if ended[k] is None:
                ended[k] = one.poll()
    assert ended == [0, 0], "each save went well"
    assert found == {"a", "b"}
    assert left_behind(tmp_path) == []


# What the disk refuses ----------------------------------------------------------------------------


def make_large():
    return Ensemble.build(lambda: nn.Linear(512, 512), 2)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, which only root may mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can't be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def short_files(tmp_path):
    """Files may have 100,000 bytes; the disk refuses to write more."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("call", CALLS)
def test_a_full_disk_leaves_the_old_file_whole(small_disk, call):
    path = small_disk / CALLS[call]
    save(call, Ensemble.build(lambda: nn.Linear(3, 2), 2), small_disk)
    old = path.read_bytes()
    with pytest.raises(OSError, match="No space left on device") as caught:
        save(call, make_large(), small_disk)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    assert path.read_bytes() == old
    assert list(small_disk.iterdir()) == [path]


@pytest.mark.parametrize("call", CALLS)
def test_a_file_that_may_not_grow_leaves_the_old_one_whole(short_files, call):
    folder, limit = short_files
    path = folder / CALLS[call]
    save(call, Ensemble.build(lambda: nn.Linear(3, 2), 2), folder)
    old, large = path.read_bytes(), make_large()
    limit()
    with pytest.raises(OSError, match="File too large") as caught:
        save(call, large, folder)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == old
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("device", ["/dev/full", "/dev/null"])
def test_a_device_is_not_replaced(device):
    with pytest.raises(OSError, match="Not a regular file") as caught:
        make_large().save(device)
    assert caught.value.filename == device
    assert Path(device).is_char_device()


def test_a_folder_and_a_pipe_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Not a regular file"):
        make_large().save(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        make_large().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.fixture
def foreign_folder():
    """A folder that this user may read and not write."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may write everywhere, nobody may not
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.parametrize("call", CALLS)
def test_a_folder_that_may_not_be_written_to(foreign_folder, call):
    with pytest.raises(PermissionError) as caught:
        save(call, make_large(), foreign_folder)
    assert caught.value.filename == str(foreign_folder / CALLS[call])
    assert list(foreign_folder.iterdir()) == []


def test_a_file_system_that_is_read_only(small_disk):
    path = small_disk / "ens.safetensors"
    Ensemble.build(lambda: nn.Linear(3, 2), 2).save(path)
    old = path.read_bytes()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="Read-only file system") as caught:
        make_large().save(path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == old


# What stays of the file before --------------------------------------------------------------------


@pytest.mark.parametrize("call", CALLS)
def test_rights_stay_and_links_are_followed(tmp_path, call):
    ens = Ensemble.build(lambda: nn.Linear(3, 2), 2)
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "file", tmp_path / CALLS[call]
    link.symlink_to(target)
    save(call, ens, tmp_path)
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o7777 == 0o666 & ~umask
    target.chmod(0o640)
    inode = target.stat().st_ino
    save(call, ens, tmp_path)
    assert link.is_symlink()
    assert target.stat().st_ino != inode, "a new file"
    assert target.stat().st_mode & 0o7777 == 0o640
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["file"]


MEMORY = """
import resource, sys, torch
from torch import nn
from unisono import Ensemble

class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.tensors = nn.ParameterList(torch.ones(5 * 2**18) for _ in range(10))  # 5 MiB each

ens = Ensemble.build(Weights, 4)  # 200 MiB in tensors of 20 MiB
Ensemble.build(lambda: nn.Linear(2, 2), 2).save(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ballast = torch.ones((before << 10) // 4)  # so that the peak is of now
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ens.save(sys.argv[1])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_saving_takes_less_memory_than_one_tensor(tmp_path):
    path = tmp_path / "ens.safetensors"
    command = [sys.executable, "-c", MEMORY, str(path)]
    grown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert path.stat().st_size > 200 * 2**20
    assert int(grown) << 10 < 20 * 2**20
