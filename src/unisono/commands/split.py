"""``unisono split``: one file of an ensemble to ordinary state dicts, one for each member."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from unisono.checkpoint.dtypes import CODES
from unisono.checkpoint.ensemble_file import COMBINATION, MEMBERS, Facts, open_ensemble
from unisono.checkpoint.reading import TensorFile
from unisono.commands.arguments import check_choice
from unisono.commands.files import OutputFolder
from unisono.commands.member_files import ensemble_of, failures_told
from unisono.commands.outcome import ArgumentError, CommandError, Interrupted
from unisono.files import replacing

FORMATS: Final = ("pt", "safetensors")
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class SplitReport:
    """What ``unisono split`` did.

    Args:
        files: What was written.
        notes: What of the ensemble isn't in them.
    """

    files: Sequence[Path]
    notes: Sequence[str]


def run_split(source: Path, out: Path, kind: str = "pt", members: str | None = None) -> SplitReport:
    """Write the state dict of each member to a file of its own; all files are written, or none.

    No class of the model is needed: a state dict is names and tensors.

    Args:
        source: A saved ensemble, a folder with one, or a run on images.
        out: The folder for the files; those in it are left as they are.
        kind: One of `FORMATS`.
        members: Which members, as ``0,3``; None for all.

    Raises:
        ArgumentError: If the ensemble or anything else can't be used.
        CommandError: If the disk refuses.
        Interrupted: On ctrl-C.
    """
    check_choice("format", kind, FORMATS)
    written: list[Path] = []
    try:
        with failures_told(), open_ensemble(ensemble_of(source)) as (file, facts):
            chosen = _chosen(members, facts.members)
            _check_dtypes(file, facts, kind)
            digits = len(str(facts.members - 1))
            paths = {i: out / f"member_{i:0{digits}}.{kind}" for i in chosen}
            _refuse_existing(paths.values())
            with OutputFolder(out) as folder, _removed_unless_all(written):
                shared = _shared_state(file, facts)
                for i, path in paths.items():
                    state = _member_state(file, i) | shared
                    with file.making_sense():
                        state = _in_order(state, facts)
                    _write(path, state)
                    written.append(path)
                folder.written = True
            notes = _notes(file, facts)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    return SplitReport(written, notes)


def _chosen(members: str | None, count: int) -> list[int]:
    if members is None:
        return list(range(count))
    try:
        chosen = [int(text) for text in members.split(",")]
    except ValueError:
        raise ArgumentError(f"--members {members}: write numbers, as 0,3") from None
    absent = [i for i in chosen if not 0 <= i < count]
    if absent:
        raise ArgumentError(f"--members {members}: there is no member {absent[0]}, of {count}")
    return list(dict.fromkeys(chosen))


def _check_dtypes(file: TensorFile, facts: Facts, kind: str) -> None:
    """Raise for what the format has no room for, before anything is written."""
    own = {key.removeprefix(MEMBERS): entry.dtype for key, entry in file.entries.items()}
    wrong = [
        f"`{name}` is {dtype}"
        for name, dtype in own.items()
        if dtype not in CODES and name not in facts.non_persistent
    ]
    if kind == "safetensors" and wrong:
        raise ArgumentError(
            f"--format safetensors has no room: {', '.join(wrong)}; take --format pt"
        )


def _refuse_existing(paths: Iterable[Path]) -> None:
    existing = [str(path) for path in paths if path.exists()]
    if existing:
        more = f" and {len(existing) - 1} more" if existing[1:] else ""
        raise ArgumentError(f"{existing[0]}{more} exist already; name another folder with --out")


def _shared_state(file: TensorFile, facts: Facts) -> dict[str, Tensor]:
    return {name: file.read(MEMBERS + name) for name in facts.shared if name not in facts.ties}


def _member_state(file: TensorFile, i: int) -> dict[str, Tensor]:
    rows = file.read_stacked([i], lambda _: _CPU)
    return {key.removeprefix(MEMBERS): tensor[0] for key, tensor in rows}


def _in_order(state: Mapping[str, Tensor], facts: Facts) -> dict[str, Tensor]:
    """All that a state dict has, tied tensors under each name, in the order of the modules."""
    every = {**state, **{name: state[first] for name, first in facts.ties.items()}}
    places = {place: k for k, place in enumerate(facts.outline)}
    names = sorted(
        every.keys() - set(facts.non_persistent),
        key=lambda name: (places.get(name.rpartition(".")[0], len(places)), name),
    )
    # Copies, in the order of their shape: safetensors takes no two names for one tensor.
    return {n: every[n].clone(memory_format=torch.contiguous_format) for n in names}


def _write(path: Path, state: dict[str, Tensor]) -> None:
    try:
        with replacing(path) as new:
            if path.suffix == ".pt":
                torch.save(state, new)
            else:
                save_file(state, new, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CommandError(f"can't write to {path}: {reason}") from error
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise CommandError(f"can't write to {path}: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _removed_unless_all(written: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _notes(file: TensorFile, facts: Facts) -> list[str]:
    notes = []
    if facts.non_persistent:
        names = ", ".join(f"`{name}`" for name in facts.non_persistent)
        notes.append(f"left out, as a state dict does: {names}, which are not persistent")
    kept = [key.removeprefix(COMBINATION) for key in file.entries if key.startswith(COMBINATION)]
    if kept:
        notes.append(f"left out, since they are of the ensemble: {', '.join(kept)}")
    return notes
