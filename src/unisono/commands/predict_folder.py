"""``unisono predict`` on a folder: its files in pieces, by one process or by many."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

import unisono
from unisono.commands.features import Finding, merge
from unisono.commands.finished import Finished, Record
from unisono.commands.outcome import ArgumentError, CommandError
from unisono.commands.pieces import (
    PIECE_ROWS,
    InputFile,
    Piece,
    identify,
    list_tables,
    order_of_work,
    read_file,
)
from unisono.commands.ranks import Ranks
from unisono.commands.row_progress import show_rows
from unisono.commands.run_folder import RunFolder
from unisono.commands.run_model import RunModel, Wishes, load_model, open_run, predict_rows

_SHOWN = 10  # facts of one kind in a message


@dataclass(frozen=True)
class FolderRequest:
    """What the user asks for.

    Args:
        run: The folder that ``unisono train`` wrote.
        input: A folder of tables, or one table.
        output: The folder for the results.
        wishes: What the results are to be.
        model: The factory of the members, if the run has one of the user's.
        device: A name of a device, or ``auto``.
        piece_rows: Rows of a piece, at least.
    """

    run: Path
    input: Path
    output: Path
    wishes: Wishes
    model: str | None = None
    device: str = "auto"
    piece_rows: int = PIECE_ROWS


@dataclass(frozen=True)
class FolderReport:
    """What was done.

    Args:
        rows: How many were predicted.
        notes: What the user should know.
    """

    rows: int
    notes: list[str]


@dataclass
class _Share:
    """What one process did."""

    rows: int = 0
    before: int = 0  # rows that were finished when it came to them
    files: list[str] = field(default_factory=list)  # names of those it finished, or found so
    faults: dict[str, str] = field(default_factory=dict)  # name of a file -> what is wrong
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    failure: str = ""  # what ends the job
    exit_code: int = 0  # of the failure


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
            counted = _Counted(ranks, advance)
            share = _Worker(request, finished, ranks, counted).work(files)
            reports = ranks.gather(_to_json(share), counted.look)
    if reports is None:
        return None
    shares = [_from_json(own) for own in reports]
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


class _Counted:
    """Counts the rows of all ranks, and shows them on rank 0."""

    def __init__(self, ranks: Ranks, advance: Callable[[int], None]) -> None:
        self._ranks = ranks
        self._advance = advance
        self._shown = 0

    def add(self, rows: int) -> None:
        done = self._ranks.add("rows", rows)
        if self._ranks.rank == 0:
            self._advance(done - self._shown)
            self._shown = done

    def look(self) -> None:
        self.add(0)

    @contextmanager
    def progress(self, total: int | None) -> Iterator[Callable[[int], None]]:
        yield self.add


class _Worker:
    """Takes one piece after another until there is none left."""

    def __init__(
        self,
        request: FolderRequest,
        finished: Finished,
        ranks: Ranks,
        counted: _Counted,
    ) -> None:
        self._where = request.input if request.input.is_dir() else request.input.parent
        self._wishes = request.wishes
        self._finished = finished
        self._ranks = ranks
        self._counted = counted
        # On the first row that isn't finished: a folder that is finished takes no time.
        self._load: Callable[[], RunModel] = functools.cache(
            lambda: load_model(RunFolder(request.run), request.model, request.device)
        )

    def work(self, files: Sequence[InputFile]) -> _Share:
        share = _Share(faults={file.name: file.fault for file in files if file.fault})
        order = order_of_work(files)
        try:
            while (turn := self._ranks.add("claimed") - 1) < len(order):
                k, j = order[turn]
                self._take(k, files[k], files[k].pieces[j], share)
        except CommandError as error:
            self._ranks.add("claimed", len(order))  # nobody begins another one
            share.failure, share.exit_code = str(error), error.exit_code
        return share

    def _take(self, k: int, file: InputFile, piece: Piece, share: _Share) -> None:
        whole = self._finished.recall(file)
        if whole is not None:
            if piece is file.pieces[0]:
                self._finished.tidy(file)
                share.files.append(file.name)
                share.findings[file.name] = list(whole.findings)
                share.before += whole.rows
                self._counted.add(whole.rows)
            return
        record = self._finished.recall(file, piece)
        if record is not None:
            share.before += record.rows
            self._counted.add(record.rows)
        else:
            loaded = self._load()
            if self._ranks.add(f"faults/{k}", 0):
                return
            try:
                record = self._predict(loaded, file, piece)
            except ArgumentError as error:
                self._ranks.add(f"faults/{k}")
                share.faults[file.name] = str(error)
                return
            share.rows += record.rows
        share.findings.setdefault(file.name, []).extend(record.findings)
        # Exactly one process counts to the last piece.
        if self._ranks.add(f"done/{k}") == len(file.pieces):
            if len(file.pieces) > 1:
                self._finished.join(file)
            share.files.append(file.name)

    def _predict(self, loaded: RunModel, file: InputFile, piece: Piece) -> Record:
        source = self._where / file.name
        target = self._finished.prepare(file, piece)
        stream = predict_rows(
            loaded,
            str(source),
            str(target),
            self._wishes,
            progress=self._counted.progress,
            groups=None if piece.groups is None else range(*piece.groups),
            rows_before=piece.rows_before,
        )
        if identify(source) != file.identity:
            raise ArgumentError(f"{source} changed while it was read")
        record = Record(stream.rows, tuple(stream.findings))
        self._finished.remember(file, piece, record)
        return record


def _conclude(
    request: FolderRequest,
    files: Sequence[InputFile],
    notes: Sequence[str],
    shares: Sequence[_Share],
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


def _told(request: FolderRequest, shares: Sequence[_Share]) -> list[str]:
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


def _to_json(share: _Share) -> dict[str, Any]:
    findings = {name: [vars(own) for own in found] for name, found in share.findings.items()}
    return {**vars(share), "findings": findings}


def _from_json(values: dict[str, Any]) -> _Share:
    findings = {
        name: [Finding(**{**own, "values": tuple(own["values"])}) for own in found]
        for name, found in values["findings"].items()
    }
    return _Share(**{**values, "findings": findings})


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
