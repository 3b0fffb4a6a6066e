"""``unisono predict``: a prediction and its uncertainty for every row of a table, as a stream."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from unisono.commands.arguments import check_choice, choose_device
from unisono.commands.in_order import map_in_order
from unisono.commands.outcome import ArgumentError, Interrupted
from unisono.commands.result_files import check_output, open_results, result_schema
from unisono.commands.run_folder import MODEL, PREPROCESSING, RunFolder
from unisono.commands.table_estimator import load_members
from unisono.commands.table_files import STANDARD, SUFFIXES, is_table, open_rows
from unisono.commands.table_stream import Model, Stream

_UNSEEN: Final = ("error", "ignore")
EVERY_COLUMN: Final = "all"


@dataclass(frozen=True)
class PredictRequest:
    """What the user asks ``unisono predict`` for.

    Args:
        run: The folder that ``unisono train`` wrote.
        input: A table, or ``-``.
        output: The file to write, or ``-``.
        keep: Columns of the input to put before the results; ``all`` for all of them.
        unseen: ``"error"`` or ``"ignore"``: what to do with values that training never saw.
        model: The factory of the members, if the run has one of the user's.
        device: A name of a device, or ``auto``.
    """

    run: Path
    input: str
    output: str
    keep: tuple[str, ...] = ()
    unseen: str = "error"
    model: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class PredictReport:
    """What ``unisono predict`` did.

    Args:
        rows: How many were predicted.
        seconds: How long it took.
        notes: What training never saw and was predicted nevertheless.
    """

    rows: int
    seconds: float
    notes: list[str]


def run_predict(request: PredictRequest, progress: Console) -> PredictReport:
    """Do what ``unisono predict`` promises.

    Args:
        request: What the user asked for.
        progress: Where to show how far it is.

    Raises:
        ArgumentError: If something can't be used; then nothing is written.
        CommandError: If the disk refuses.
        Interrupted: On ctrl-C; then nothing is written.
    """
    check_choice("policy for --unseen", request.unseen, _UNSEEN)
    for option, path in (("--input", request.input), ("--output", request.output)):
        if path != STANDARD and not is_table(path):
            ends = " or ".join(SUFFIXES)
            raise ArgumentError(f"{option} {path}: a file that ends in {ends} is expected, or -")
    check_output(request.output, request.input)
    started = time.perf_counter()
    try:
        found = _predict(request, progress)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; nothing was written") from None
    rows, notes = found
    return PredictReport(rows, time.perf_counter() - started, notes)


def _predict(request: PredictRequest, progress: Console) -> tuple[int, list[str]]:
    folder = RunFolder(request.run)
    run = folder.description
    if run.kind != "table":
        raise ArgumentError(
            f"{request.run} is a run on the images {run.data}; predict takes runs on tables"
        )
    with _without_collection():
        model, example = _load(folder, request)
    everything = EVERY_COLUMN in request.keep
    keep = None if everything else request.keep
    with open_rows(request.input, run.columns, keep) as rows:
        import pyarrow as pa

        names = list(rows.schema.names) if everything else list(dict.fromkeys(request.keep))
        kept = pa.schema([rows.schema.field(name) for name in names])
        schema = result_schema(kept, model.schema(example))
        stream = Stream(model, schema, kept.names, refuse=request.unseen == "error")
        with (
            _progress(progress, rows.total, shown=request.output != STANDARD) as advance,
            open_results(request.output, schema) as writer,
            closing(
                map_in_order(
                    stream.predict, stream.numbered(rows.batches), threads=torch.get_num_threads()
                )
            ) as parts,
        ):
            for part in parts:
                results = stream.collect(part)
                if results is not None:
                    writer.write(results)
                advance(part.rows)
            stream.check(request.input)
    return stream.rows, [f"training never saw: {finding}" for finding in stream.findings]


def _load(folder: RunFolder, request: PredictRequest) -> tuple[Model, list[Any]]:
    """The model of a run, and its results for one row."""
    run = folder.description
    members = load_members(folder, request.model, choose_device(request.device))
    model = Model(run, folder.preprocessing(), members)
    try:
        # Here and not first on several threads: what the first call of a process prepares silences
        # warnings, which isn't safe there.
        return model, model.predict(np.zeros((1, len(run.columns))))
    except (ValueError, RuntimeError) as error:
        fault = f"its features aren't those of {MODEL}: {' '.join(str(error).split())}"
        raise folder.damaged(PREPROCESSING, fault) from error


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Don't look for garbage among the modules that are imported meanwhile: all of them stay."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def _progress(
    console: Console, total: int | None, *, shown: bool
) -> Iterator[Callable[[int], None]]:
    """Give a function to tell how many rows were done; shown in a terminal only.

    Not beside results on standard output: those that show up in the terminal would tear the bar.
    """
    if not (shown and console.is_terminal):
        yield lambda rows: None
        return
    bar = Progress(
        TextColumn("predicting"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.completed:,} rows"),
        TimeElapsedColumn() if total is None else TimeRemainingColumn(),
        console=console,
        transient=True,
        expand=True,
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda rows: bar.advance(task, rows)
