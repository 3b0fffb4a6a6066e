"""How a prediction shows how far it is: a live bar in a terminal, nothing elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def show_rows(
    console: Console, total: int | None, *, shown: bool
) -> Iterator[Callable[[int], None]]:
    """Give a function to tell how many rows were done; shown in a terminal only.

    Args:
        console: The terminal.
        total: How many rows there are; None if that isn't known.
        shown: Whether to show anything. Not beside results on standard output: those that show up
            in the terminal would tear the bar.
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
