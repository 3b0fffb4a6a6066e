"""What one process does of a folder: it takes one piece after another until there is none left."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unisono.commands.features import Finding
from unisono.commands.finished import Finished, Record
from unisono.commands.outcome import ArgumentError, CommandError
from unisono.commands.pieces import PIECE_ROWS, InputFile, Piece, identify, order_of_work
from unisono.commands.ranks import Ranks
from unisono.commands.run_folder import RunFolder
from unisono.commands.run_model import RunModel, Wishes, load_model, predict_rows


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


@dataclass
class Share:
    """What one process did.

    Args:
        rows: How many it predicted.
        before: How many were finished when it came to them.
        files: Names of the files that it finished, or found finished.
        faults: Name of a file that can't be predicted -> why.
        findings: Name of a file -> what in it training never saw.
        failure: What ends the job; empty if nothing does.
        exit_code: Of the failure.
    """

    rows: int = 0
    before: int = 0
    files: list[str] = field(default_factory=list)
    faults: dict[str, str] = field(default_factory=dict)
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    failure: str = ""
    exit_code: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        findings = {name: [vars(own) for own in found] for name, found in self.findings.items()}
        return {**vars(self), "findings": findings}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Share:
        """Make one of what `to_json` gave."""
        findings = {
            name: [Finding(**{**own, "values": tuple(own["values"])}) for own in found]
            for name, found in values["findings"].items()
        }
        return cls(**{**values, "findings": findings})


class RowCount:
    """Counts the rows of all ranks, and shows them on rank 0.

    Args:
        ranks: Who takes part.
        advance: Told of new rows.
    """

    def __init__(self, ranks: Ranks, advance: Callable[[int], None]) -> None:
        self._ranks = ranks
        self._advance = advance
        self._shown = 0

    def add(self, rows: int) -> None:
        """Count rows that are done."""
        done = self._ranks.add("rows", rows)
        if self._ranks.rank == 0:
            self._advance(done - self._shown)
            self._shown = done

    def look(self) -> None:
        """Show what the others did meanwhile."""
        self.add(0)

    @contextmanager
    def progress(self, total: int | None) -> Iterator[Callable[[int], None]]:
        """Count the rows of one piece, for `predict_rows`."""
        yield self.add


class Worker:
    """Predicts pieces.

    Args:
        request: What the user asked for.
        finished: What is done already.
        ranks: Who takes part.
        count: Of the rows.
    """

    def __init__(
        self,
        request: FolderRequest,
        finished: Finished,
        ranks: Ranks,
        count: RowCount,
    ) -> None:
        self._where = request.input if request.input.is_dir() else request.input.parent
        self._wishes = request.wishes
        self._finished = finished
        self._ranks = ranks
        self._count = count
        # On the first row that isn't finished: a folder that is finished takes no time.
        self._load: Callable[[], RunModel] = functools.cache(
            lambda: load_model(RunFolder(request.run), request.model, request.device)
        )

    def work(self, files: Sequence[InputFile]) -> Share:
        """Take pieces of these files, the same on every rank, as long as there are any.

        A file that can't be predicted keeps nobody from the others; what else goes wrong ends the
        work of all.
        """
        share = Share(faults={file.name: file.fault for file in files if file.fault})
        order = order_of_work(files)
        try:
            while (turn := self._ranks.add("claimed") - 1) < len(order):
                k, j = order[turn]
                self._take(k, files[k], files[k].pieces[j], share)
        except CommandError as error:
            self._ranks.add("claimed", len(order))  # nobody begins another one
            share.failure, share.exit_code = str(error), error.exit_code
        return share

    def _take(self, k: int, file: InputFile, piece: Piece, share: Share) -> None:
        whole = self._finished.recall(file)
        if whole is not None:
            if piece is file.pieces[0]:
                self._finished.tidy(file)
                share.files.append(file.name)
                share.findings[file.name] = list(whole.findings)
                share.before += whole.rows
                self._count.add(whole.rows)
            return
        record = self._finished.recall(file, piece)
        if record is not None:
            share.before += record.rows
            self._count.add(record.rows)
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
            progress=self._count.progress,
            groups=None if piece.groups is None else range(*piece.groups),
            rows_before=piece.rows_before,
        )
        if identify(source) != file.identity:
            raise ArgumentError(f"{source} changed while it was read")
        record = Record(stream.rows, tuple(stream.findings))
        self._finished.remember(file, piece, record)
        return record
