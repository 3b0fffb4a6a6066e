"""``unisono merge``: checkpoints of single models to one file of an ensemble."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from unisono.commands.member_files import (
    check_out_file,
    choose_member_factory,
    failures_told,
    picking,
)
from unisono.commands.models import MakeModel, describe
from unisono.commands.outcome import ArgumentError, CommandError, Interrupted
from unisono.ensemble import Ensemble
from unisono.errors import EnsembleWarning, UnsupportedModelError

_SUFFIX: Final = ".safetensors"


@dataclass(frozen=True)
class MergeRequest:
    """What the user asks ``unisono merge`` for.

    Args:
        files: One for each member.
        model: ``package.module:factory`` of the members.
        out: The file to write.
        shared: Names or patterns of tensors to be kept once.
        select: Dotted key of the state dict in what the files hold.
        strip: What is taken off the front of the names.
    """

    files: tuple[Path, ...]
    model: str
    out: Path
    shared: tuple[str, ...] = ()
    select: str | None = None
    strip: str = ""


@dataclass(frozen=True)
class MergeReport:
    """What ``unisono merge`` did.

    Args:
        members: How many there are.
        parameters: Of each.
        notes: What isn't in the file.
    """

    members: int
    parameters: int
    notes: Sequence[str]


def run_merge(request: MergeRequest) -> MergeReport:
    """Do what ``unisono merge`` promises.

    Args:
        request: What the user asked for.

    Raises:
        ArgumentError: If anything doesn't fit; then nothing is written.
        CommandError: If the disk refuses; a file that was there before is as it was.
        Interrupted: On ctrl-C; likewise.
    """
    out = check_out_file(request.out, list(request.files))
    if out.suffix != _SUFFIX:
        raise ArgumentError(f"--out {out}: an ensemble is saved as NAME{_SUFFIX}")
    try:
        make_model = choose_member_factory(request.model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", EnsembleWarning)
            ens = _gather(request, make_model)
            _save(ens, out)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {out} is as it was") from None
    notes = [str(w.message) for w in caught if issubclass(w.category, EnsembleWarning)]
    one = ens[0]
    return MergeReport(len(ens), sum(p.numel() for p in one.parameters()), notes)


def _gather(request: MergeRequest, make_model: MakeModel) -> Ensemble:
    try:
        with failures_told():
            return Ensemble.from_checkpoints(
                make_model,
                request.files,
                select=picking(request.select, request.strip),
                shared=request.shared,
            )
    except UnsupportedModelError as error:
        raise ArgumentError(f"--model {request.model}: {describe(error)}") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise ArgumentError(" ".join(str(error).split())) from error


def _save(ens: Ensemble, out: Path) -> None:
    try:
        ens.save(out)
    except OSError as error:
        raise CommandError(f"can't write to {out}: {error.strerror or error}") from error
