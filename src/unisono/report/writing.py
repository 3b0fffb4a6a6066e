"""From the folder of a run to the file of its report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from unisono.files import replacing
from unisono.plots.arrays import Array
from unisono.report.page import render
from unisono.report.run import Run

if TYPE_CHECKING:
    from unisono.commands.run_folder import Description

REPORT: Final = "report.html"
# What ``metrics.json`` has beside settings, scores (which are dicts) and curves (lists of lists).
_CURVES: Final = ("train_loss", "validation_loss", "combined_loss")
_RESULTS: Final = (*_CURVES, "stopped", "best_epoch", "divided_images")


def write_report(run_folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into the folder of a run, whole or not at all.

    The file needs no network and no other file; the same run gives the same bytes.

    Args:
        run_folder: What ``unisono train`` left.

    Returns:
        Path of the file.

    Raises:
        ValueError: If the folder isn't a run, or one of its files is missing or damaged.
        MissingExtraError: If Matplotlib isn't installed.
        OSError: If the file can't be written; one that was there before is as it was.

    Example:
        >>> write_report("runs/no-such-run")
        Traceback (most recent call last):
        ...
        unisono.commands.outcome.ArgumentError: runs/no-such-run doesn't exist; give the folder ...
    """
    page = render(read_run(run_folder))
    file = Path(run_folder) / REPORT
    with replacing(file) as new:
        new.write_text(page, encoding="utf-8")
    return file


def read_run(run_folder: str | os.PathLike[str]) -> Run:
    """Read what a report tells from the folder of a run.

    Args:
        run_folder: What ``unisono train`` left.

    Returns:
        The run, for `render`.

    Raises:
        ValueError: If the folder isn't a run, or one of its files is missing or damaged.

    Example:
        >>> read_run("runs/no-such-run")
        Traceback (most recent call last):
        ...
        unisono.commands.outcome.ArgumentError: runs/no-such-run doesn't exist; give the folder ...
    """
    # The format of the folder belongs to the command line, which stands above this package.
    from unisono.commands.outcome import ArgumentError
    from unisono.commands.run_folder import RunFolder

    folder = RunFolder(Path(run_folder))
    about = folder.description
    found, metrics = folder.test_outputs(), folder.metrics()
    plan, table = folder.plan(), folder.test_table()
    try:
        loss, validation_loss, combined_loss = (_curve(metrics.get(name)) for name in _CURVES)
        return Run(
            name=folder.path.resolve().name,
            task="regression" if about.task == "regression" else "classification",
            outputs=found.outputs.numpy(),
            targets=found.targets.numpy(),
            rows=found.rows.numpy(),
            classes=about.classes,
            settings=_settings(about, metrics),
            columns=_columns(about),
            target=about.target,
            plan=plan,
            images=None if found.inputs is None else found.inputs.numpy(),
            table=table,
            loss=loss,
            validation_loss=validation_loss,
            combined_loss=combined_loss,
        )
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{folder.path} can't be used: {error}; train again") from error


def _settings(about: Description, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for and with what, without what came out."""
    found = {
        name.replace("_", " "): value
        for name, value in metrics.items()
        if name not in _RESULTS and name not in about.versions and _is_plain(value)
    }
    found.pop("classes", None)  # named one by one, if there are any
    return {**found, "versions": about.versions} if about.versions else found


def _is_plain(value: Any) -> bool:
    """Whether it is one value, or a list of such."""
    values = value if isinstance(value, list) else [value]
    return all(own is None or isinstance(own, str | int | float) for own in values)


def _columns(about: Description) -> list[dict[str, Any]]:
    used = [
        {
            "column": column.name,
            "used as": column.kind,
            "type": column.type,
            "missing values": column.missing,
            "categories": column.categories,
        }
        for column in about.columns
    ]
    nothing = dict.fromkeys(("type", "missing values", "categories"))
    left_out = [
        {"column": name, "used as": f"left out: {why}", **nothing}
        for name, why in about.dropped.items()
    ]
    return [*used, *left_out]


def _curve(values: Any) -> Array | None:
    """Losses of a JSON file, where None stands for what isn't finite."""
    return None if values is None else np.array(values, dtype=np.float64)
