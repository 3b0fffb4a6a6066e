"""A bar that tells how a training goes, in a terminal or a notebook."""

from __future__ import annotations

from types import TracebackType

import numpy as np
from tqdm.auto import tqdm

from unisono.training.history import EpochRecord


class Progress:
    """A tqdm bar over the minibatches of all epochs, with the losses of the last epoch.

    Args:
        epochs: How many there are to be.
        done: How many are done.
        steps: Minibatches of an epoch; None if nobody knows.
        num_members: N.
        shown: Whether there is a bar at all.
    """

    def __init__(
        self, epochs: int, done: int, steps: int | None, num_members: int, *, shown: bool
    ) -> None:
        self._epochs = epochs
        self._num_members = num_members
        total = None if steps is None else steps * epochs
        self._bar = tqdm(
            total=total, initial=done * (steps or 0), unit=" steps", disable=not shown, leave=True
        )
        self._bar.set_description(f"epoch {done}/{epochs}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the bar where it stands."""
        self._bar.close()

    def step(self) -> None:
        """One minibatch is done."""
        self._bar.update()

    def epoch(self, number: int, record: EpochRecord, running: int) -> None:
        """An epoch is done.

        Args:
            number: Counted from 0.
            record: What came of it.
            running: How many members go on.
        """
        self._bar.set_description(f"epoch {number + 1}/{self._epochs}")
        facts = [f"loss {spread(record.loss)}"]
        if record.validation is not None:
            facts.append(f"validation {spread(record.validation.loss)}")
            facts.append(f"combined {record.validation.combined_loss:.3g}")
        if running < self._num_members:
            facts.append(f"{running} of {self._num_members} members go on")
        self._bar.set_postfix_str(", ".join(facts))


def spread(losses: np.ndarray) -> str:
    """The mean, the lowest and the highest of the members' losses.

    Example:
        >>> spread(np.array([0.25, 0.35, np.nan]))
        '0.3 (0.25 to 0.35)'
    """
    known = losses[np.isfinite(losses)]
    if not len(known):
        return "not finite"
    if len(known) == 1:
        return f"{known[0]:.3g}"
    return f"{known.mean():.3g} ({known.min():.3g} to {known.max():.3g})"
