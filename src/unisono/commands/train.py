"""``unisono train``: check everything, train, measure, draw, and only then write."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from unisono.commands.arguments import (
    at_least,
    check_choice,
    check_learning_rate,
    check_seed,
    choose_device,
)
from unisono.commands.data import LOADERS, Split
from unisono.commands.disagreement import DividedImage, most_divided
from unisono.extras import require
from unisono.commands.files import OutputFolder
from unisono.commands.learning import Settings, Trained, count_steps, train_classifier
from unisono.commands.metrics import Scores, accuracy, finite_or_none, negative_log_likelihood
from unisono.commands.models import MakeModel, choose_factory, describe
from unisono.commands.outcome import ArgumentError, Interrupted
from unisono.commands.progress import report_progress
from unisono.commands.tables import score_table
from unisono.errors import IncompatibleMembersError, UnsupportedModelError

METRICS: Final = "metrics.json"
PICTURE: Final = "disagreement.png"


@dataclass(frozen=True)
class TrainRequest:
    """The command line of ``unisono train``, unchecked.

    Args:
        data: A key of `LOADERS`.
        model: ``mlp``, ``cnn`` or ``package.module:factory``.
        members: Number of models.
        epochs: Passes over the training images.
        seed: Where all randomness starts.
        lr: Learning rate.
        batch_size: Images per minibatch.
        device: A name of a device, or ``auto``.
        out: Folder for the results; None for ``runs/<data>``.
    """

    data: str = "mnist5k"
    model: str = "mlp"
    members: int = 10
    epochs: int = 15
    seed: int = 0
    lr: float = 1e-3
    batch_size: int = 64
    device: str = "auto"
    out: Path | None = None


@dataclass(frozen=True, eq=False)
class TrainReport:
    """The results of ``unisono train``.

    Args:
        metrics: What stands in the file `METRICS`. It has neither times nor paths, so the
            same request gives the same file.
        table: The same for people.
        files: What was written.
        seconds: How long the training took.
    """

    metrics: dict[str, Any]
    table: Table
    files: list[Path]
    seconds: float


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
    folder = OutputFolder(request.out or Path("runs") / request.data)
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
        raise Interrupted(f"interrupted; {state}") from None


def check_request(request: TrainRequest) -> Settings:
    """Check every value that can be checked without loading anything.

    Raises:
        ArgumentError: For the first value that can't be used.
    """
    check_choice("data", request.data, LOADERS)
    return Settings(
        members=at_least("--members", request.members),
        epochs=at_least("--epochs", request.epochs),
        seed=check_seed(request.seed),
        lr=check_learning_rate(request.lr),
        batch_size=at_least("--batch-size", request.batch_size),
        device=choose_device(request.device),
    )


def _train_into(
    folder: OutputFolder,
    request: TrainRequest,
    settings: Settings,
    split: Split,
    make_model: MakeModel,
    progress: Console,
) -> TrainReport:
    started = time.perf_counter()
    steps = count_steps(len(split.train_images), settings.batch_size)
    with report_progress(progress, epochs=settings.epochs, steps=steps) as reporter:
        try:
            trained = train_classifier(make_model, split, settings, reporter)
        except IncompatibleMembersError as error:  # the factory's doing
            first = "; ".join(str(difference) for difference in error.differences[:1])
            raise ArgumentError(
                f"--model {request.model}: it must make the same architecture each time: {first}"
            ) from error
        except UnsupportedModelError as error:
            raise ArgumentError(f"--model {request.model}: {describe(error)}") from error
    seconds = time.perf_counter() - started
    labels = split.test_labels
    right = accuracy(trained.logits, labels)
    surprise = negative_log_likelihood(trained.logits, labels)
    divided = most_divided(trained.logits, labels)
    metrics = collect_metrics(request, settings, split, trained, right, surprise, divided)
    models = "model" if settings.members == 1 else "models"
    what = f"{settings.members} {models} ({request.model}) on {request.data}"
    picture = _draw(divided, split, settings.members, what)
    content = (json.dumps(metrics, indent=2, allow_nan=False) + "\n").encode()
    files = folder.write({PICTURE: picture, METRICS: content})
    title = f"{what}, {len(labels):,} test images"
    return TrainReport(metrics, score_table(title, right, surprise), files, seconds)


def _draw(divided: list[DividedImage], split: Split, members: int, title: str) -> bytes:
    # Imported here: matplotlib is an extra, and `require` has made sure of it by now.
    from unisono.commands.picture import draw_divided

    return draw_divided(divided, split.test_images, members=members, title=title)


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
    return {
        "data": request.data,
        "model": request.model,
        "members": settings.members,
        "epochs": settings.epochs,
        "seed": settings.seed,
        "lr": settings.lr,
        "batch_size": settings.batch_size,
        "device": settings.device.type,
        "torch": torch.__version__,
        "train_images": len(split.train_images),
        "test_images": len(split.test_images),
        "classes": split.classes,
        "accuracy": right.to_json(),
        "nll": surprise.to_json(),
        "train_loss": [[finite_or_none(loss) for loss in losses] for losses in trained.losses],
        "divided_images": len(divided),
        "most_divided": [
            {"index": case.index, "label": case.label, "votes": list(case.votes)}
            for case in divided[:20]
        ],
    }
