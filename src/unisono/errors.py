"""The exceptions and the warning that unisono raises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Difference:
    """One fact in which a member differs from member 0.

    Args:
        member: Index of the member, counted from 0.
        path: Dotted path of the parameter, buffer, submodule or attribute.
        found: What the member has there, as text.
        expected: What member 0 has there, as text.
    """

    member: int
    path: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"member {self.member}, `{self.path}`: {self.found}; member 0 has {self.expected}"


class EnsembleError(Exception):
    """Base class of the errors raised by unisono."""


class IncompatibleMembersError(EnsembleError, ValueError):
    """The models are not copies of one architecture.

    Args:
        message: The whole text for the user.
        differences: Every difference that was found, in order of member and path.
    """

    def __init__(self, message: str, differences: Sequence[Difference] = ()) -> None:
        super().__init__(message)
        self.differences: tuple[Difference, ...] = tuple(differences)


class UnsupportedModelError(EnsembleError, TypeError):
    """The model is of a kind that can't be a member of an ensemble."""


class CheckpointError(EnsembleError, ValueError):
    """A stored or given state doesn't fit the ensemble.

    Args:
        message: The whole text for the user; of many problems it lists the first few.
        problems: Every problem that was found, in the order of the files, where there may be many.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[str, ...] = tuple(problems)


class ExportError(EnsembleError, RuntimeError):
    """An ensemble can't be exported as asked for, or what was exported computes something else."""


class MissingExtraError(EnsembleError, ImportError):
    """An optional dependency isn't installed; the message names the extra to install."""


class EnsembleWarning(UserWarning):
    """Something ran in another way than asked for; the message names where and the remedy."""
