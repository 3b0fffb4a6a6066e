"""A run loaded to predict with, and the way of rows from a file to a file of results."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from unisono.commands.arguments import choose_device
from unisono.commands.in_order import map_in_order
from unisono.commands.outcome import ArgumentError
from unisono.commands.result_files import open_results, result_schema
from unisono.commands.run_folder import MODEL, PREPROCESSING, RunFolder
from unisono.commands.table_estimator import load_members
from unisono.commands.table_files import open_rows
from unisono.commands.table_stream import Model, Stream

EVERY_COLUMN: Final = "all"
UNSEEN: Final = ("error", "ignore")

Progress = Callable[[int | None], AbstractContextManager[Callable[[int], None]]]
"""From the number of rows, None if it isn't known, to a function to tell how many were done."""


@dataclass(frozen=True, eq=False)
class RunModel:
    """What a run predicts with.

    Args:
        model: From rows to results.
        example: Its results for one row.
    """

    model: Model
    example: list[Any]


@dataclass(frozen=True)
class Wishes:
    """What the results of a file are to be.

    Args:
        keep: Columns of the input to put before the results; ``all`` for all of them.
        unseen: ``"error"`` or ``"ignore"``: what to do with values that training never saw.
    """

    keep: tuple[str, ...] = ()
    unseen: str = "error"


def open_run(folder: RunFolder) -> None:
    """Check that a run is one that rows can be predicted with.

    Raises:
        ArgumentError: If it is a run on images.
    """
    run = folder.description
    if run.kind != "table":
        raise ArgumentError(
            f"{folder.path} is a run on the images {run.data}; predict takes runs on tables"
        )


def load_model(folder: RunFolder, factory: str | None, device: str) -> RunModel:
    """Load the members and the preprocessing of a run.

    Args:
        folder: The run, on a table.
        factory: ``--model``, if the members are made by a factory of the user's.
        device: A name of a device, or ``auto``.

    Raises:
        ArgumentError: If the run is damaged, or the factory or the device isn't the right one.
    """
    with _without_collection():
        run = folder.description
        members = load_members(folder, factory, choose_device(device))
        model = Model(run, folder.preprocessing(), members)
        try:
            # Here and not first on several threads: what the first call of a process prepares
            # silences warnings, which isn't safe there.
            return RunModel(model, model.predict(np.zeros((1, len(run.columns)))))
        except (ValueError, RuntimeError) as error:
            fault = f"its features aren't those of {MODEL}: {' '.join(str(error).split())}"
            raise folder.damaged(PREPROCESSING, fault) from error


def predict_rows(
    loaded: RunModel,
    source: str,
    target: str,
    wishes: Wishes,
    *,
    progress: Progress,
    groups: range | None = None,
    rows_before: int = 0,
) -> Stream:
    """Predict the rows of a file and write the results.

    Args:
        loaded: What to predict with.
        source: A file that ends in .csv or .parquet, or ``-``.
        target: Likewise; it is put in place when it is whole.
        wishes: What the results are to be.
        progress: Told of every batch.
        groups: The row groups of a Parquet file to take; then there may be no rows in them. None
            for the whole file.
        rows_before: How many rows of the file come before those.

    Returns:
        The stream at its end: how many rows there were, and what training never saw.

    Raises:
        ArgumentError: If something in the file can't be used; then nothing is written.
        CommandError: If the disk refuses.
    """
    everything = EVERY_COLUMN in wishes.keep
    keep = None if everything else wishes.keep
    with open_rows(source, loaded.model.run.columns, keep, groups=groups) as rows:
        import pyarrow as pa

        names = list(rows.schema.names) if everything else list(dict.fromkeys(wishes.keep))
        kept = pa.schema([rows.schema.field(name) for name in names])
        schema = result_schema(kept, loaded.model.schema(loaded.example))
        stream = Stream(
            loaded.model,
            schema,
            kept.names,
            refuse=wishes.unseen == "error",
            rows_before=rows_before,
        )
        with (
            progress(rows.total) as advance,
            open_results(target, schema) as writer,
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
            if groups is None:
                stream.check_rows(source)
            stream.check(source)
    return stream


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
