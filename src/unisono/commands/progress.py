"""How a training shows that it lives: a live bar in a terminal, a line per epoch elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from unisono.commands.learning import Reporter


@contextlib.contextmanager
def report_progress(console: Console, *, epochs: int) -> Iterator[Reporter]:
    """Give a training something to report to.

    Args:
        console: Where to show it; a log file or a pipe gets plain lines.
        epochs: Number of epochs.

    Yields:
        The reporter. A live bar is taken off the screen when the block ends.
    """
    if not console.is_terminal:
        yield _Lines(console, epochs)
        return
    bar = Progress(
        TextColumn("epoch"),
        TextColumn("{task.fields[epoch]}/{task.fields[epochs]}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        expand=True,
    )
    with bar:
        task = bar.add_task("", total=epochs, epoch=1, epochs=epochs, loss="loss -")
        yield _Bar(bar, task, epochs)


def describe_losses(losses: list[float]) -> str:
    """Say the mean loss and the spread over the members in a few characters.

    Example:
        >>> describe_losses([0.5, 0.7, 0.6])
        'loss 0.600 (0.500 to 0.700)'
    """
    if not losses:
        return "loss -"
    mean = sum(losses) / len(losses)
    spread = f" ({min(losses):.3f} to {max(losses):.3f})" if len(losses) > 1 else ""
    return f"loss {mean:.3f}{spread}"


class _Bar:
    """Moves a live bar; the screen itself is redrawn by rich's thread."""

    def __init__(self, bar: Progress, task: TaskID, epochs: int) -> None:
        self._bar = bar
        self._task = task
        self._epochs = epochs

    def epoch(self, number: int, losses: list[float]) -> None:
        current = min(number + 1, self._epochs)
        loss = describe_losses(losses)
        self._bar.update(self._task, completed=number, epoch=current, loss=loss)


class _Lines:
    """Prints one line per epoch."""

    def __init__(self, console: Console, epochs: int) -> None:
        self._console = console
        self._epochs = epochs

    def epoch(self, number: int, losses: list[float]) -> None:
        line = f"epoch {number}/{self._epochs}  {describe_losses(losses)}"
        self._console.print(line, markup=False, highlight=False)
