"""How a command ends early: one line for the user and an exit code.

A command raises one of these from wherever the fact becomes known; ``unisono.cli.main`` is
the only place that prints the line and turns the code into the exit status.
"""

from __future__ import annotations


class CommandError(Exception):
    """The command can't go on; the message is one line for the user."""

    exit_code = 1


class ArgumentError(CommandError, ValueError):
    """An argument can't be used; nothing was computed or written."""

    exit_code = 2


class Interrupted(CommandError):
    """The user pressed ctrl-C; the message says what is on disk."""

    exit_code = 130
