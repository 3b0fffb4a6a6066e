"""Read broken files by the hundred thousand: only a clear error may come out.

``python tests/checkpoint/fuzz.py --files 100000 --seed 0``

File i of a seed is always the same: ``--first i --files 1`` reads it once more. Files are read in
a child process. One that crashes it, takes longer than ``--seconds``, more than ``--room`` bytes of
memory, raises another error, or silently gives other values than were saved, is kept in ``--keep``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import random
import re
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mutations import ANY, OF, change_header
from unisono import CheckpointError, Ensemble
from unisono.cli import main as command_line
from whole_files import FOLDER, WHOLE, Whole

_HANGS = "it hangs"
_SECOND = "from_checkpoints behind another"
_START = 120.0  # seconds that a child may take to start


@dataclass(frozen=True)
class Broken:
    """A file, or a folder of files, in which something is changed.

    Args:
        whole: What it was.
        files: Path below the folder of whole files -> content.
        is_forged: Whether checksums were made to agree, so that other values may be read.
        is_second: Whether it is read behind a whole file that it is like.
    """

    whole: Whole
    files: dict[str, bytes]
    is_forged: bool
    is_second: bool = False


@dataclass
class Tally:
    """What came of the files.

    Args:
        outcomes: Kind of outcome -> number of calls.
        messages: Refusals without names and numbers -> how many, to see how deep files get.
        findings: Number of a file -> what went wrong.
        peak: The most memory in use above that at the start, in bytes.
    """

    outcomes: collections.Counter[str] = field(default_factory=collections.Counter)
    messages: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: dict[int, str] = field(default_factory=dict)
    peak: int = 0


def make_broken(seed: int, number: int) -> Broken:
    """File ``number`` of a seed."""
    dice = random.Random(f"{seed}/{number}")
    whole = dice.choice(WHOLE)
    path = FOLDER / whole.path
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    files = {str(p.relative_to(FOLDER)): p.read_bytes() for p in paths}
    target = dice.choice(sorted(files))
    ways = OF[Path(target).suffix]
    is_forged = False
    if dice.random() < 0.02:  # swapped files
        other = FOLDER / dice.choice(WHOLE).path
        files[target] = (other if other.is_file() else paths[0]).read_bytes()
    for _ in range(dice.choice([1, 1, 1, 2, 2, 3, 5])):
        way = dice.choice(ways)
        is_forged = is_forged or way is change_header
        files[target] = way(files[target], dice)
    if dice.random() < 0.05:
        files[target] = dice.choice(ANY)(files[target], dice)
    return Broken(whole, files, is_forged, is_second=dice.random() < 0.3)


def readers(whole: Whole, path: Path) -> dict[str, Callable[[], Any]]:
    """Every way to read what once was this file."""
    make_model, good = whole.make_model, FOLDER / whole.path

    if not whole.is_ensemble:
        return {
            "from_checkpoints": lambda: Ensemble.from_checkpoints(
                make_model, [path], select=whole.select
            ),
            _SECOND: lambda: Ensemble.from_checkpoints(
                make_model, [good, path], select=whole.select
            ),
            "inspect": lambda: inspect(path, whole.key),
        }
    return {
        "load": lambda: Ensemble.load(path, make_model),
        "load two members": lambda: Ensemble.load(path, make_model, members=[2, 0]),
        "inspect": lambda: inspect(path, whole.key),
        "from_checkpoints": lambda: Ensemble.from_checkpoints(make_model, [path]),
    }


def inspect(path: Path, key: str | None) -> None:
    """Run ``unisono inspect``, whose one line of complaint becomes an error here."""
    options = [] if key is None else ["--select", key]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command_line(["inspect", str(path), *options])
    if "\x1b" in out.getvalue() + err.getvalue():
        raise RuntimeError("what is in a file reaches the terminal")
    if code:
        raise CheckpointError(err.getvalue())


def read_broken(broken: Broken, folder: Path) -> Iterator[tuple[str, str]]:
    """Read it in every way.

    Yields:
        Outcome, which is "read", "refused" or "finding", and the message.
    """
    for name, content in broken.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    for way, read in readers(broken.whole, folder / broken.whole.path).items():
        if way == _SECOND and not broken.is_second:
            continue
        try:
            found = read()
        except (CheckpointError, OSError) as error:
            yield "refused", str(error).replace(str(folder), "")
        except BaseException:
            yield "finding", f"{way}: {traceback.format_exc()}"
        else:
            wrong = _what_is_wrong(found, broken, way)
            yield ("finding", f"{way}: {wrong}") if wrong else ("read", "")


def _what_is_wrong(found: Any, broken: Broken, way: str) -> str | None:
    if not isinstance(found, Ensemble):
        return None
    for tensor in found.state_dict().values():  # all of it is there
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).sum()
    if not broken.whole.is_ensemble or broken.is_forged:
        return None
    whole = Ensemble.load(FOLDER / broken.whole.path, broken.whole.make_model)
    expected = (whole[[2, 0]] if way == "load two members" else whole).state_dict()
    state = found.state_dict()
    if state.keys() != expected.keys():
        return f"names are {list(state)}, were {list(expected)}"
    pairs = {name: [t.contiguous().reshape(-1).view(torch.uint8) for t in (state[name], value)]
             for name, value in expected.items()}  # fmt: skip
    other = [name for name, pair in pairs.items() if not torch.equal(*pair)]
    return f"other values, silently: {other}" if other else None


# The child ----------------------------------------------------------------------------------------


def work(seed: int, numbers: range, room: int) -> None:
    """Read these files, and tell of each in one line."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for whole in WHOLE:  # warm up: what is imported late counts to the start
        for read in readers(whole, FOLDER / whole.path).values():
            with contextlib.suppress(CheckpointError):
                read()
    _limit(4 * room)
    start = _peak()
    for number in numbers:
        print("begin", number, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            for outcome, text in read_broken(make_broken(seed, number), Path(folder)):
                print(outcome, _printable(text), flush=True)
        print("peak", _peak() - start, flush=True)
        if _peak() - start > room:
            break  # the parent tells, and starts another child


def _limit(room: int) -> None:
    """Let an allocation of far more fail, rather than the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + room, resource.RLIM_INFINITY)
    )


def _peak() -> int:
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _printable(text: str) -> str:
    return text.encode("unicode_escape", "replace").decode()[:8000]


# The parent ---------------------------------------------------------------------------------------


def fuzz(seed: int, first: int, files: int, *, seconds: float = 5.0, room: int = 2**30) -> Tally:
    """Read the files in child processes; go on with the next when one ends a child.

    Args:
        seed: The seed.
        first: Number of the first file.
        files: How many.
        seconds: How long one may take.
        room: How much memory reading may take, in bytes.
    """
    tally, at = Tally(), first
    while at < first + files:
        at = _run(seed, at, first + files - at, seconds, room, tally)
        late = at - 1
        if tally.findings.get(late, "").startswith(_HANGS):
            # The machine may have been busy: by itself it gets more time.
            del tally.findings[late]
            _run(seed, late, 1, 6 * seconds, room, tally)
    return tally


def _run(seed: int, at: int, files: int, seconds: float, room: int, tally: Tally) -> int:
    """Read files in one child; the number of the file to go on with."""
    command = ["--seed", seed, "--first", at, "--files", files, "--room", room]
    with subprocess.Popen(
        [sys.executable, __file__, "--child", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as child:
        return _follow(child, at, seconds, room, tally)


def _follow(
    child: subprocess.Popen[bytes], at: int, seconds: float, room: int, tally: Tally
) -> int:
    """Take down what a child tells until it ends; the number of the file to go on with."""
    lines, limit, begun = _lines(child), _START, False
    while True:
        line = lines(limit)
        if line is None:
            child.kill()
            tally.findings[at] = f"{_HANGS}: more than {limit} s"
            return at + 1
        if not line:
            break
        limit = seconds
        kind, _, text = line.partition(" ")
        if kind == "begin":
            at, begun = int(text), True
        elif kind == "peak":
            tally.peak = max(tally.peak, int(text))
            if int(text) > room:
                tally.findings[at] = f"memory: {int(text) / 2**20:.0f} MiB"
            at, begun = at + 1, False
        else:
            tally.outcomes[kind] += 1
            if kind == "finding":
                tally.findings.setdefault(at, text)
            tally.messages[_kind(text)] += 1
    if child.wait() and not begun:
        raise RuntimeError(f"the child didn't start: {child.stderr.read().decode()}")
    if begun:
        tally.findings[at] = f"the process ended with {child.returncode}"
        return at + 1
    return at


def _kind(text: str) -> str:
    """A message without what is of this file alone."""
    text = re.sub(r"^Ensemble.from_checkpoints: .*?:(\\n)+ *", "", text)
    text = re.sub(r"^\S+ isn't (an ensemble of unisono|the checkpoint of a model): ", "", text)
    return re.sub(r"`[^`]*`|'[^']*'|[\d,.]+|/\S+", "…", text)[:60]


def _lines(child: subprocess.Popen[bytes]) -> Callable[[float], str | None]:
    """A function that waits for the next line: "" at the end, None if it takes too long."""
    buffered = bytearray()
    pipe = child.stdout
    assert pipe

    def next_line(limit: float) -> str | None:
        while b"\n" not in buffered:
            if not select.select([pipe], [], [], limit)[0]:
                return None
            part = pipe.read1(65536)
            if not part:
                return ""
            buffered.extend(part)
        line, _, rest = bytes(buffered).partition(b"\n")
        buffered[:] = rest
        return line.decode()

    return next_line


def keep(seed: int, tally: Tally, folder: Path) -> None:
    """Write the files that were findings."""
    for number in tally.findings:
        for name, content in make_broken(seed, number).files.items():
            target = folder / f"{seed}-{number}" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def main() -> int:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--room", type=int, default=2**30, help="bytes of memory")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "fuzz")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work(args.seed, range(args.first, args.first + args.files), args.room)
        return 0
    begun = time.monotonic()
    tally = fuzz(args.seed, args.first, args.files, seconds=args.seconds, room=args.room)
    for number, text in sorted(tally.findings.items()):
        print(f"--- file {number}: {text.encode().decode('unicode_escape')}")
    for message, count in tally.messages.most_common(60):
        print(f"{count:8d}  {message}")
    keep(args.seed, tally, args.keep)
    print(
        f"{args.files} files of seed {args.seed} in {time.monotonic() - begun:.0f} s,"
        f" {dict(tally.outcomes)}, {len(tally.messages)} kinds of message, peak"
        f" {tally.peak / 2**20:.0f} MiB above the start, {len(tally.findings)} findings"
    )
    return bool(tally.findings)


if __name__ == "__main__":
    sys.exit(main())
