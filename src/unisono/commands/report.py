"""``unisono report``: one HTML file about a run."""

from __future__ import annotations

from pathlib import Path

from unisono.commands.outcome import ArgumentError, CommandError
from unisono.files import replacing


def run_report(run: Path, out: Path | None) -> Path:
    """Write the report of a run.

    Args:
        run: The folder that ``unisono train`` wrote.
        out: The file; None for ``report.html`` in the folder.

    Returns:
        The file.

    Raises:
        ArgumentError: If the folder isn't a run, or the file can't be one.
        CommandError: If the disk refuses; a file that was there before is as it was.
        MissingExtraError: If Matplotlib isn't installed.
    """
    from unisono.report.page import render
    from unisono.report.writing import REPORT, read_run

    target = run / REPORT if out is None else out
    if target.is_dir():
        raise ArgumentError(f"--out {target} is a folder; give a file")
    if out is not None and not out.parent.is_dir():
        raise ArgumentError(f"--out {out}: there is no folder {out.parent}")
    page = render(read_run(run))
    try:
        with replacing(target) as new:
            new.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"can't write to {target}: {error.strerror or error}") from error
    return target
