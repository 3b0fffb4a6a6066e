"""``unisono predict`` on a folder: its files in pieces, by one process or by many."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console

import unisono
from unisono.commands.features import Finding, merge
from unisono.commands.finished import Finished
from unisono.commands.outcome import ArgumentError, CommandError
from unisono.commands.piece_worker import FolderRequest, RowCount, Share, Worker
from unisono.commands.pieces import InputFile, list_tables, read_file
from unisono.commands.ranks import Ranks
from unisono.commands.row_progress import show_rows
from unisono.commands.run_folder import RunFolder
from unisono.commands.run_model import open_run

_SHOWN: Final = 10  # facts of one kind in a message


@dataclass(frozen=True)
class FolderReport:
    """What was done.

    Args:
        rows: How many were predicted.
        notes: What the user should know.
    """

    rows: int
    notes: list[str]


def check_folders(request: FolderRequest) -> None:
    """Find what keeps the folders from being used, before anything is made.

    Raises:
        ArgumentError: If the input isn't there, the output is a file, or one lies in the other.
    """
    source, output = request.input.resolve(), request.output.resolve()
    if not source.exists():
        raise ArgumentError(f"can't read {request.input}: No such file or directory")
    if output.exists() and not output.is_dir():
        raise ArgumentError(f"--output {request.output} is a file; give a folder")
    folder = source if source.is_dir() else source.parent
    inside = folder.is_relative_to(output) or (source.is_dir() and output.is_relative_to(folder))
    if inside:
        raise ArgumentError(
            f"--output {request.output} and --input {request.input}: one lies in the other; give "
            "another folder"
        )


def predict_folder(request: FolderRequest, ranks: Ranks, console: Console) -> FolderReport | None:
    """Predict all that isn't finished yet.

    Args:
        request: What the user asked for.
        ranks: Who takes part.
        console: Where rank 0 shows how far it is.

    Returns:
        What was done by all; None on other ranks than 0.

    Raises:
        ArgumentError: If something can't be used. What could be predicted is finished.
        CommandError: If the disk refuses, or other processes are lost.
    """
    finished = Finished(request.output)
    with ExitStack() as lock:
        plan = ranks.share(lambda: _begin(request, finished, lock))
        files = [InputFile.from_json(own) for own in plan["files"]]
        totals = [piece.rows for file in files for piece in file.pieces]
        total = None if None in totals else sum(rows or 0 for rows in totals)
        with show_rows(console, total, shown=ranks.rank == 0) as advance:
            count = RowCount(ranks, advance)
            share = Worker(request, finished, ranks, count).work(files)
            reports = ranks.gather(share.to_json(), count.look)
    if reports is None:
        return None
    shares = [Share.from_json(own) for own in reports]
    return _conclude(request, files, plan["notes"], shares)


def _begin(request: FolderRequest, finished: Finished, lock: ExitStack) -> dict[str, Any]:
    """What all processes have to agree on."""
    folder = RunFolder(request.run)
    open_run(folder)
    where = request.input if request.input.is_dir() else request.input.parent
    names, others = (
        list_tables(request.input) if request.input.is_dir() else ([request.input.name], [])
    )
    finished.begin(
        {
            "input": str(where.resolve()),
            "run": folder.digest,
            "keep": list(request.wishes.keep),
            "unseen": request.wishes.unseen,
            "model": request.model,
            "piece_rows": request.piece_rows,
            "version": unisono.__version__,
        }
    )
    lock.enter_context(finished.locked())
    notes = []
    if others:
        notes.append(f"passed over, neither .csv nor .parquet: {_listed(others)}")
    strangers = finished.strangers(set(names))
    if strangers:
        notes.append(
            f"{request.output} holds results of files that aren't in the input: "
            f"{_listed(strangers)}"
        )
    files = [read_file(where, name, request.piece_rows).to_json() for name in names]
    return {"files": files, "notes": notes}


def _conclude(
    request: FolderRequest,
    files: Sequence[InputFile],
    notes: Sequence[str],
    shares: Sequence[Share],
) -> FolderReport:
    """Put together what the processes did.

    Raises:
        ArgumentError: If files couldn't be predicted.
        CommandError: If the job was ended.
    """
    failed = [share for share in shares if share.failure]
    if failed:
        if failed[0].exit_code == ArgumentError.exit_code:
            raise ArgumentError(failed[0].failure)
        raise CommandError(
            f"{failed[0].failure}; what is finished is kept, and the same command goes on from "
            "there"
        )
    faults = {name: text for share in shares for name, text in share.faults.items()}
    if faults:
        first = "; ".join(faults[name] for name in sorted(faults)[:_SHOWN])
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ArgumentError(
            f"{len(faults)} of {len(files)} files can't be predicted, the others are finished: "
            f"{first}{more}"
        )
    done = {name for share in shares for name in share.files}
    lost = [file.name for file in files if file.name not in done]
    if lost:
        raise CommandError(f"unfinished, the same command goes on: {_listed(lost)}")
    return FolderReport(sum(share.rows for share in shares), [*notes, *_told(request, shares)])


def _told(request: FolderRequest, shares: Sequence[Share]) -> list[str]:
    found: dict[str, list[Finding]] = {}
    for share in shares:
        for name, own in share.findings.items():
            found[name] = merge([*found.get(name, []), *own])
    lines = [f"{name}: training never saw: {own}" for name in sorted(found) for own in found[name]]
    told = lines[:_SHOWN]
    if len(lines) > _SHOWN:
        told.append(f"and {len(lines) - _SHOWN} more of these")
    before = sum(share.before for share in shares)
    if before:
        told.append(f"{before:,} rows of {request.output} were finished before")
    return told


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
