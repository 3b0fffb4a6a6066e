"""``unisono train`` on a table: read, split, prepare, train, score, and only then write."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from unisono.commands.arguments import (
    SAMPLINGS,
    at_least,
    check_choice,
    check_seed,
    check_share,
    choose_device,
    parse_rates,
)
from unisono.commands.files import OutputFolder
from unisono.commands.outcome import ArgumentError, Interrupted
from unisono.commands.table_data import TableData, prepare
from unisono.commands.table_estimator import (
    TableSettings,
    choose_table_factory,
    member_outputs,
    train_estimator,
)
from unisono.commands.table_run import table_run
from unisono.commands.table_scores import score
from unisono.commands.train import TrainReport, stop_notes
from unisono.extras import require
from unisono.training.joining import is_first_of_all

TASKS: Final = ("classification", "regression")


@dataclass(frozen=True)
class TableRequest:
    """The command line of ``unisono train`` on a table, unchecked.

    Args:
        data: A file that ends in .csv or .parquet.
        target: The column to predict.
        task: ``classification`` or ``regression``.
        test_share: Part of the rows to test on.
        categorical: Columns of whole numbers that are categories.
        drop: Columns to leave out.
        model: ``mlp`` or ``package.module:factory``.
        members: Number of models; None for as many as there are learning rates, or 10.
        epochs: Passes over the training rows.
        seed: Where all randomness starts.
        lr: Learning rates: see `parse_rates`.
        batch_size: Rows per minibatch.
        device: A name of a device, or ``auto``.
        out: Folder for the results; None for ``runs/`` and the name of the file.
        sampling: Which rows each member sees.
        patience: Epochs without improvement after which a member stops; 0 for never.
    """

    data: Path = Path("table.csv")
    target: str | None = None
    task: str | None = None
    test_share: float = 0.2
    categorical: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    model: str = "mlp"
    members: int | None = None
    epochs: int = 100
    seed: int = 0
    lr: tuple[str, ...] = ("3e-3",)
    batch_size: int = 64
    device: str = "auto"
    out: Path | None = None
    sampling: str = "shuffled"
    patience: int = 5


def run_train_table(request: TableRequest, progress: Console) -> TrainReport:
    """Do what ``unisono train`` promises for a table.

    Args:
        request: What the user asked for.
        progress: Where to show how far the training is.

    Returns:
        The results; they are also on disk, in the folder of the request.

    Raises:
        ArgumentError: If something in the request or the file can't be used; found before
            training, and nothing is written.
        MissingExtraError: If a package that is needed isn't installed.
        Interrupted: On ctrl-C; then the disk is as it was.
    """
    settings = check_request(request)
    for package in ("pyarrow", "sklearn", "skops"):
        require(package, extra="tables", purpose="training on a table")
    require("matplotlib", extra="plots", purpose="the picture of the losses")
    module = choose_table_factory(request.model)
    path = request.out or Path("runs") / request.data.stem
    folder = OutputFolder(path, writes=is_first_of_all())
    try:
        data = prepare(
            request.data,
            target=str(request.target),
            task=settings.task,
            test_share=request.test_share,
            seed=settings.seed,
            categorical=request.categorical,
            drop=request.drop,
        )
        with folder:
            started = time.perf_counter()
            estimator = train_estimator(
                settings,
                module,
                data.features[data.train],
                data.target.values[data.train],
                verbose=progress.is_terminal,
            )
            seconds = time.perf_counter() - started
            return _write(folder, request, settings, data, estimator, seconds)
    except KeyboardInterrupt:
        state = f"look at {folder.path}" if folder.written else "nothing was written"
        raise Interrupted(f"interrupted; {state}") from None


def check_request(request: TableRequest) -> TableSettings:
    """Check every value that can be checked without reading anything.

    Raises:
        ArgumentError: For the first value that can't be used.
    """
    if request.target is None:
        raise ArgumentError(f"--target is needed for {request.data}: the column to predict")
    if request.task is None:
        raise ArgumentError(f"--task is needed for {request.data}: classification or regression")
    check_choice("task", request.task, TASKS)
    check_choice("sampling", request.sampling, SAMPLINGS)
    check_share("--test-share", request.test_share)
    rates = parse_rates(request.lr, request.members)
    return TableSettings(
        task=request.task,
        model=request.model,
        members=len(rates),
        epochs=at_least("--epochs", request.epochs),
        seed=check_seed(request.seed),
        rates=rates,
        batch_size=at_least("--batch-size", request.batch_size),
        device=choose_device(request.device),
        sampling=request.sampling,
        patience=at_least("--patience", request.patience, 0) or None,
    )


def _write(
    folder: OutputFolder,
    request: TableRequest,
    settings: TableSettings,
    data: TableData,
    estimator: Any,
    seconds: float,
) -> TrainReport:
    outputs = member_outputs(estimator, data.features[data.test])
    targets = torch.from_numpy(data.target.values[data.test])
    rates = settings.rates if len(set(settings.rates)) > 1 else None
    models = "model" if settings.members == 1 else "models"
    what = f"{settings.members} {models} ({settings.model}) on {request.data.name}"
    title = f"{what}, {len(targets):,} test rows"
    scores, table = score(settings.task, outputs, targets, title=title, rates=rates)
    metrics = collect_metrics(request, settings, data, estimator, scores)
    files = folder.write(
        table_run(settings.model, str(request.target), data, estimator, outputs, metrics, what)
    )
    notes = [*data.notes, *stop_notes(estimator.history_)]
    return TrainReport(metrics, table, files, seconds, notes)


def collect_metrics(
    request: TableRequest,
    settings: TableSettings,
    data: TableData,
    estimator: Any,
    scores: dict[str, Any],
) -> dict[str, Any]:
    """Gather what goes into ``metrics.json``.

    Returns:
        Plain lists, numbers and strings; a value that isn't finite is None.
    """
    history = estimator.history_.to_dict()
    same = len(set(settings.rates)) == 1
    return {
        "data": request.data.name,
        "target": request.target,
        "task": settings.task,
        "model": settings.model,
        "members": settings.members,
        "epochs": settings.epochs,
        "seed": settings.seed,
        "lr": settings.rates[0] if same else list(settings.rates),
        "batch_size": settings.batch_size,
        "sampling": settings.sampling,
        "patience": settings.patience,
        "device": settings.device.type,
        "torch": torch.__version__,
        "test_share": request.test_share,
        "train_rows": len(data.train),
        "test_rows": len(data.test),
        "columns": len(data.choice.columns),
        "dropped": len(data.choice.dropped),
        "features": data.features.shape[1],
        **({"classes": list(data.target.classes)} if data.target.classes else {}),
        **scores,
        "train_loss": history["loss"],
        "validation_loss": history["validation_loss"],
        "stopped": history["stopped"],
        "best_epoch": history["best_epoch"],
    }
