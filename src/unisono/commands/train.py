"""``unisono train``: check everything, train, measure, draw, and only then write."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from unisono.commands.arguments import (
    SAMPLINGS,
    at_least,
    check_choice,
    check_seed,
    choose_device,
    parse_rates,
)
from unisono.commands.data import LOADERS, Split
from unisono.commands.disagreement import DividedImage, most_divided
from unisono.commands.files import OutputFolder
from unisono.commands.image_run import image_run
from unisono.commands.learning import Settings, Trained, train_classifier
from unisono.commands.metrics import Scores, accuracy, negative_log_likelihood
from unisono.commands.models import MakeModel, choose_factory, describe
from unisono.commands.outcome import ArgumentError, Interrupted
from unisono.commands.progress import report_progress
from unisono.commands.run_folder import CURVES as CURVES
from unisono.commands.run_folder import METRICS as METRICS
from unisono.commands.tables import score_table
from unisono.errors import CheckpointError, IncompatibleMembersError, UnsupportedModelError
from unisono.extras import require
from unisono.training.history import History, Stop
from unisono.training.joining import is_first_of_all

PICTURE: Final = "disagreement.png"
SWEEP: Final = "sweep.png"
CHECKPOINT: Final = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainRequest:
    """The command line of ``unisono train``, unchecked.

    Args:
        data: A key of `LOADERS`.
        model: ``mlp``, ``cnn`` or ``package.module:factory``.
        members: Number of models; None for as many as there are learning rates, or 10.
        epochs: Passes over the training images.
        seed: Where all randomness starts.
        lr: Learning rates: see `parse_rates`.
        batch_size: Images per minibatch.
        device: A name of a device, or ``auto``.
        out: Folder for the results; None for ``runs/<data>``.
        sampling: Which images each member sees.
        patience: Epochs without improvement after which a member stops; None for never.
        checkpoint_every: Epochs between two checkpoints; None for none at all.
        resume: Whether to go on from the checkpoint in the folder.
    """

    data: str = "mnist5k"
    model: str = "mlp"
    members: int | None = None
    epochs: int = 15
    seed: int = 0
    lr: tuple[str, ...] = ("1e-3",)
    batch_size: int = 64
    device: str = "auto"
    out: Path | None = None
    sampling: str = "shuffled"
    patience: int | None = None
    checkpoint_every: int | None = None
    resume: bool = False


@dataclass(frozen=True, eq=False)
class TrainReport:
    """The results of ``unisono train``.

    Args:
        metrics: What stands in the file `METRICS`. It has neither times nor paths, so the
            same request gives the same file.
        table: The same for people.
        files: What was written.
        seconds: How long the training took.
        notes: Which members stopped early, and why.
    """

    metrics: dict[str, Any]
    table: Table
    files: list[Path]
    seconds: float
    notes: list[str]


def run_train(request: TrainRequest, progress: Console) -> TrainReport:
    """Do what ``unisono train`` promises.

    Args:
        request: What the user asked for.
        progress: Where to show how far the training is.

    Returns:
        The results; they are also on disk, in the folder of the request.

    Raises:
        ArgumentError: If something in the request can't be used; found before training.
        MissingExtraError: If the data or the picture need a package that isn't installed.
        Interrupted: On ctrl-C; then the disk is as it was.
    """
    settings = check_request(request)
    path = request.out or Path("runs") / request.data
    folder = OutputFolder(path, writes=is_first_of_all())
    _check_checkpoint(settings)
    try:
        split = LOADERS[request.data]()
        at_most = len(split.train_images)
        if request.batch_size > at_most:
            raise ArgumentError(
                f"--batch-size must be at most {at_most}, the number of training images, "
                f"got {request.batch_size}"
            )
        make_model = choose_factory(request.model, split)
        require("matplotlib", extra="plots", purpose="the picture of the divided images")
        with folder:
            return _train_into(folder, request, settings, split, make_model, progress)
    except KeyboardInterrupt:
        state = f"look at {folder.path}" if folder.written else "nothing was written"
        if settings.checkpoint is not None and settings.checkpoint.exists():
            state = "the same command with --resume goes on from the last checkpoint"
        raise Interrupted(f"interrupted; {state}") from None


def check_request(request: TrainRequest) -> Settings:
    """Check every value that can be checked without loading anything.

    Raises:
        ArgumentError: For the first value that can't be used.
    """
    check_choice("data", request.data, (*LOADERS, "file.csv", "file.parquet"))
    check_choice("sampling", request.sampling, SAMPLINGS)
    rates = parse_rates(request.lr, request.members)
    every = request.checkpoint_every
    keeps = every is not None or request.resume
    return Settings(
        members=len(rates),
        epochs=at_least("--epochs", request.epochs),
        seed=check_seed(request.seed),
        rates=rates,
        batch_size=at_least("--batch-size", request.batch_size),
        device=choose_device(request.device),
        sampling=request.sampling,
        patience=None if request.patience is None else at_least("--patience", request.patience),
        checkpoint=(request.out or Path("runs") / request.data) / CHECKPOINT if keeps else None,
        checkpoint_every=1 if every is None else at_least("--checkpoint-every", every),
        resume=request.resume,
    )


def _check_checkpoint(settings: Settings) -> None:
    """Raise unless the checkpoint is there exactly if the training is to go on from it."""
    file = settings.checkpoint
    if file is None or file.exists() == settings.resume:
        return
    if settings.resume:
        raise ArgumentError(f"--resume: there is no {file}; leave --resume out to start")
    raise ArgumentError(f"{file} is of an earlier run: add --resume, or name another --out")


def _train_into(
    folder: OutputFolder,
    request: TrainRequest,
    settings: Settings,
    split: Split,
    make_model: MakeModel,
    progress: Console,
) -> TrainReport:
    started = time.perf_counter()
    with report_progress(progress, epochs=settings.epochs) as reporter:
        try:
            trained = train_classifier(make_model, split, settings, reporter)
        except IncompatibleMembersError as error:  # the factory's doing
            first = "; ".join(str(difference) for difference in error.differences[:1])
            raise ArgumentError(
                f"--model {request.model}: it must make the same architecture each time: {first}"
            ) from error
        except UnsupportedModelError as error:
            raise ArgumentError(f"--model {request.model}: {describe(error)}") from error
        except CheckpointError as error:
            raise ArgumentError(f"--resume: {' '.join(str(error).split())}") from error
    seconds = time.perf_counter() - started
    labels = split.test_labels
    right = accuracy(trained.logits, labels)
    surprise = negative_log_likelihood(trained.logits, labels)
    divided = most_divided(trained.logits, labels)
    metrics = collect_metrics(request, settings, split, trained, right, surprise, divided)
    models = "model" if settings.members == 1 else "models"
    what = f"{settings.members} {models} ({request.model}) on {request.data}"
    content = (json.dumps(metrics, indent=2, allow_nan=False) + "\n").encode()
    pictures = _draw(divided, split, settings, trained, right, what)
    contents = {**pictures, METRICS: content}
    files = folder.write(image_run(request.data, request.model, split, trained, contents))
    title = f"{what}, {len(labels):,} test images"
    table = score_table(title, right, surprise, rates=_own_rates(settings))
    return TrainReport(metrics, table, files, seconds, stop_notes(trained.history))


def _own_rates(settings: Settings) -> tuple[float, ...] | None:
    """The learning rates if they differ."""
    return settings.rates if len(set(settings.rates)) > 1 else None


def stop_notes(history: History) -> list[str]:
    """Say which members stopped before the last epoch, and why."""
    stopped = history.stopped
    texts: dict[Stop, str] = {
        "patience": "stopped early",
        "not finite": "were frozen, their loss was not finite",
    }
    found = []
    for why, text in texts.items():
        members = [str(i) for i, own in enumerate(stopped) if own == why]
        if members:
            listed = ", ".join(members[:10]) + (" ..." if len(members) > 10 else "")
            found.append(f"{len(members)} of {len(stopped)} members {text}: {listed}")
    return found


def _draw(
    divided: list[DividedImage],
    split: Split,
    settings: Settings,
    trained: Trained,
    right: Scores,
    title: str,
) -> dict[str, bytes]:
    # Imported here: matplotlib is an extra, and `require` has made sure of it by now.
    from unisono.commands.picture import draw_divided
    from unisono.plots import learning_curves, sweep, to_png

    history = trained.history
    members = settings.members
    curves = learning_curves(history.loss, validation_loss=history.validation_loss, title=title)
    found = {
        PICTURE: draw_divided(divided, split.test_images, members=members, title=title),
        CURVES: to_png(curves),
    }
    rates = _own_rates(settings)
    if rates is not None:
        scores = np.array(right.members)
        figure = sweep(np.array(rates), scores, what="learning rate", score="test accuracy")
        found[SWEEP] = to_png(figure)
    return found


def collect_metrics(
    request: TrainRequest,
    settings: Settings,
    split: Split,
    trained: Trained,
    right: Scores,
    surprise: Scores,
    divided: list[DividedImage],
) -> dict[str, Any]:
    """Gather what goes into the JSON file.

    Returns:
        Plain lists, numbers and strings; a value that isn't finite is None.
    """
    history = trained.history.to_dict()
    return {
        "data": request.data,
        "model": request.model,
        "members": settings.members,
        "epochs": settings.epochs,
        "seed": settings.seed,
        "lr": list(settings.rates) if _own_rates(settings) else settings.rates[0],
        "batch_size": settings.batch_size,
        "sampling": settings.sampling,
        "patience": settings.patience,
        "device": settings.device.type,
        "torch": torch.__version__,
        "train_images": len(split.train_images),
        "test_images": len(split.test_images),
        "classes": split.classes,
        "accuracy": right.to_json(),
        "nll": surprise.to_json(),
        "train_loss": history["loss"],
        "validation_loss": history["validation_loss"],
        "stopped": history["stopped"],
        "best_epoch": history["best_epoch"],
        "divided_images": len(divided),
        "most_divided": [
            {"index": case.index, "label": case.label, "votes": list(case.votes)}
            for case in divided[:20]
        ],
    }
