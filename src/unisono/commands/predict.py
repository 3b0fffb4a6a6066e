"""``unisono predict``: a prediction and its uncertainty for every row of a table, or of many."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from unisono.commands.arguments import at_least, check_choice
from unisono.commands.launching import launch
from unisono.commands.outcome import ArgumentError, CommandError, Interrupted
from unisono.commands.piece_worker import FolderRequest
from unisono.commands.predict_folder import FolderReport, check_folders, predict_folder
from unisono.commands.ranks import are_given, join_ranks
from unisono.commands.result_files import check_output
from unisono.commands.row_progress import show_rows
from unisono.commands.run_folder import RunFolder
from unisono.commands.run_model import UNSEEN, Wishes, load_model, open_run, predict_rows
from unisono.commands.table_files import STANDARD, SUFFIXES, is_table
from unisono.extras import require


@dataclass(frozen=True)
class PredictRequest:
    """What the user asks ``unisono predict`` for.

    Args:
        run: The folder that ``unisono train`` wrote.
        input: A table, a folder of tables, or ``-``.
        output: The file to write, for a folder the folder, or ``-``.
        keep: Columns of the input to put before the results; ``all`` for all of them.
        unseen: ``"error"`` or ``"ignore"``: what to do with values that training never saw.
        model: The factory of the members, if the run has one of the user's.
        device: A name of a device, or ``auto``.
        launch: How many processes to start; None for this one alone, or those that are there.
    """

    run: Path
    input: str
    output: str
    keep: tuple[str, ...] = ()
    unseen: str = "error"
    model: str | None = None
    device: str = "auto"
    launch: int | None = None


@dataclass(frozen=True)
class PredictReport:
    """What ``unisono predict`` did.

    Args:
        rows: How many were predicted.
        seconds: How long it took.
        notes: What training never saw and was predicted nevertheless, and the like.
    """

    rows: int
    seconds: float
    notes: list[str]


def run_predict(request: PredictRequest, progress: Console) -> PredictReport | None:
    """Do what ``unisono predict`` promises.

    Args:
        request: What the user asked for.
        progress: Where to show how far it is.

    Returns:
        What was done; None in a process that `torchrun` started and that isn't the first.

    Raises:
        ArgumentError: If something can't be used; then nothing is written, of a folder not those
            files that can't be used.
        CommandError: If the disk refuses.
        Interrupted: On ctrl-C; then nothing is written, of a folder what wasn't finished.
    """
    check_choice("policy for --unseen", request.unseen, UNSEEN)
    started = time.perf_counter()
    if _is_folder(request):
        report = _run_folder(request, progress)
        if report is None:
            return None
        return PredictReport(report.rows, time.perf_counter() - started, report.notes)
    for option, path in (("--input", request.input), ("--output", request.output)):
        if path != STANDARD and not is_table(path):
            ends = " or ".join(SUFFIXES)
            raise ArgumentError(f"{option} {path}: a file that ends in {ends} is expected, or -")
    check_output(request.output, request.input)
    try:
        rows, notes = _predict_file(request, progress)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    return PredictReport(rows, time.perf_counter() - started, notes)


def _predict_file(request: PredictRequest, console: Console) -> tuple[int, list[str]]:
    folder = RunFolder(request.run)
    open_run(folder)
    loaded = load_model(folder, request.model, request.device)
    stream = predict_rows(
        loaded,
        request.input,
        request.output,
        Wishes(request.keep, request.unseen),
        progress=lambda total: show_rows(console, total, shown=request.output != STANDARD),
    )
    return stream.rows, [f"training never saw: {finding}" for finding in stream.findings]


def _is_folder(request: PredictRequest) -> bool:
    """Whether the results are a folder; raise if processes can't share out the work."""
    several = request.launch is not None or are_given()
    if request.launch is not None:
        at_least("--launch", request.launch)
        if are_given():
            raise ArgumentError(
                f"--launch {request.launch}: this process was started by torchrun (RANK is set), "
                "which has started the others too; leave --launch out"
            )
    if several and (STANDARD in (request.input, request.output) or is_table(request.output)):
        raise ArgumentError(
            f"--output {request.output}: several processes write a folder; give the name of one"
        )
    return several or (request.input != STANDARD and Path(request.input).is_dir())


def _run_folder(request: PredictRequest, console: Console) -> FolderReport | None:
    asked = FolderRequest(
        request.run,
        Path(request.input),
        Path(request.output),
        Wishes(request.keep, request.unseen),
        request.model,
        request.device,
    )
    check_folders(asked)
    require("pyarrow", extra="tables", purpose="a table")
    try:
        if request.launch is None:
            with join_ranks() as ranks:
                return predict_folder(_on_own_device(asked), ranks, console)
        return predict_by_processes(asked, request.launch)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; what is finished is kept, and the same command goes on from there"
        ) from None


def predict_by_processes(request: FolderRequest, processes: int) -> FolderReport | None:
    """Predict a folder by several processes on this machine.

    Args:
        request: What the user asked for.
        processes: How many to start.

    Raises:
        ArgumentError, CommandError: As of `predict_folder`.
        KeyboardInterrupt: On ctrl-C.
    """
    threads = max(1, torch.get_num_threads() // processes)
    found = launch(_work, (request, threads), processes)
    failed = [own for own in found if isinstance(own, CommandError)]
    if failed:
        raise failed[0]
    return next(own for own in found if isinstance(own, FolderReport))


def _work(task: tuple[FolderRequest, int]) -> FolderReport | CommandError | None:
    """What each process does; an error that is meant for the user goes back as a value."""
    request, threads = task
    import pyarrow as pa

    try:
        torch.set_num_threads(threads)
        pa.set_cpu_count(threads)
        with join_ranks() as ranks:
            report = predict_folder(_on_own_device(request), ranks, Console(stderr=True))
        return None if report is None else _with_restarts(report)
    except CommandError as error:
        return error


def _with_restarts(report: FolderReport) -> FolderReport:
    """Add a note if the launcher had to start the processes anew."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not restarts:
        return report
    times = "once" if restarts == 1 else f"{restarts} times"
    note = f"the processes were started anew {times}, because one of them was killed"
    return replace(report, notes=[*report.notes, note])


def _on_own_device(request: FolderRequest) -> FolderRequest:
    """Give each process of a machine a GPU of its own, where there are several."""
    count = torch.cuda.device_count()
    if request.device in ("auto", "cuda") and count > 1 and are_given():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return replace(request, device=f"cuda:{local % count}")
    return request
