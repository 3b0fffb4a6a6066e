"""``unisono predict``: a prediction and its uncertainty for every row of a table, as a stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
from unisono.commands.features import Finding, encode, merge
from unisono.commands.in_order import map_in_order
from unisono.commands.outcome import ArgumentError, Interrupted
from unisono.commands.preprocessing import to_features
from unisono.commands.result_files import check_output, open_results, result_schema
from unisono.commands.run_folder import MODEL, PREPROCESSING, Description, RunFolder
from unisono.commands.table_estimator import load_estimator
from unisono.commands.table_files import STANDARD, SUFFIXES, is_table, open_rows

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema
    from sklearn.compose import ColumnTransformer

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
    model = Model(
        run,
        folder.preprocessing(),
        load_estimator(folder, request.model, choose_device(request.device)),
    )
    try:
        # Here and not first on several threads: what the first call of a process prepares silences
        # warnings, which isn't safe there.
        example = model.predict(np.zeros((1, len(run.columns))))
    except (ValueError, RuntimeError) as error:
        fault = f"its features aren't those of {MODEL}: {' '.join(str(error).split())}"
        raise folder.damaged(PREPROCESSING, fault) from error
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


@dataclass(frozen=True, eq=False)
class Model:
    """From rows to results.

    Args:
        run: What the columns and the classes are.
        preprocessing: Columns to features.
        estimator: Features to predictions.
    """

    run: Description
    preprocessing: ColumnTransformer
    estimator: Any

    def schema(self, example: list[Any]) -> Schema:
        """The columns of the results, as wide as the arrays of an example."""
        import pyarrow as pa

        shares = [f"probability_{label}" for label in self.run.classes]
        names = ["prediction", *shares, "total", "aleatoric", "epistemic"]
        unit = "nats" if self.run.classes else "standard deviation, in the unit of the target"
        fields = [pa.field(*own) for own in zip(names, (a.type for a in example), strict=True)]
        return pa.schema(fields, metadata={"uncertainty": unit})

    def predict(self, values: np.ndarray[Any, np.dtype[np.float64]]) -> list[Any]:
        """Return the arrays of the results for encoded rows.

        Shape:
            - values: ``(B, columns)``
        """
        import pyarrow as pa

        found = self.estimator.predict_uncertainty(to_features(self.preprocessing, values))
        parts = [found.total, found.aleatoric, found.epistemic]
        if self.run.classes:
            best = pa.array(found.prediction.argmax(1))
            columns = [pa.array(self.run.classes).take(best), *map(pa.array, found.prediction.T)]
        else:
            columns = [pa.array(found.prediction)]
            parts = [np.sqrt(variance) for variance in parts]
        return [*columns, *map(pa.array, parts)]


@dataclass(frozen=True, eq=False)
class Part:
    """What became of a part of a stream.

    Args:
        rows: How many rows it had.
        findings: What in them training never saw.
        results: The columns of the output; None if there won't be any.
    """

    rows: int
    findings: list[Finding]
    results: RecordBatch | None


class Stream:
    """The rows of one file; they may be predicted on several threads.

    After the first row that can't be predicted, the rest is only looked through, so that one
    message names everything.

    Args:
        model: What predicts.
        schema: Of the output.
        keep: The columns of the input in it.
        refuse: Whether values that training never saw are an error.
    """

    def __init__(self, model: Model, schema: Schema, keep: Sequence[str], *, refuse: bool) -> None:
        self.rows = 0
        self.findings: list[Finding] = []
        self._model = model
        self._schema = schema
        self._keep = keep
        self._refuse = refuse

    def numbered(self, batches: Iterable[RecordBatch]) -> Iterator[tuple[int, RecordBatch]]:
        """Give each batch with the number of rows before it."""
        for batch in batches:
            before = self.rows
            self.rows += batch.num_rows
            yield before, batch

    def predict(self, numbered: tuple[int, RecordBatch]) -> Part:
        """Predict one batch; changes nothing."""
        import pyarrow as pa

        before, batch = numbered
        values, found = encode(batch, self._model.run.columns, rows_before=before)
        if self._refused() or self._refused(found):
            return Part(batch.num_rows, found, None)
        kept = [batch.column(name).cast(self._schema.field(name).type) for name in self._keep]
        columns = [*kept, *self._model.predict(values)]
        return Part(batch.num_rows, found, pa.record_batch(columns, schema=self._schema))

    def collect(self, part: Part) -> RecordBatch | None:
        """Take in the parts in their order; returns what is to be written."""
        self.findings = merge([*self.findings, *part.findings])
        return None if self._refused() else part.results

    def check(self, name: str) -> None:
        """Raise if there were rows that can't be predicted, or none at all.

        Raises:
            ArgumentError: With every column of them.
        """
        if not self.rows:
            raise ArgumentError(f"{name} has no rows")
        refused = self._refused()
        if refused:
            ignore = all(finding.what != "infinite" for finding in refused)
            remedy = "; add --unseen ignore to predict nevertheless" if ignore else ""
            facts = "; ".join(str(finding) for finding in refused)
            raise ArgumentError(f"{name} has values that training never saw: {facts}{remedy}")

    def _refused(self, findings: list[Finding] | None = None) -> list[Finding]:
        """Those of the findings that can't be predicted."""
        known = self.findings if findings is None else findings
        return [finding for finding in known if self._refuse or finding.what == "infinite"]


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
