"""The console entry point ``unisono``: every way a command can end becomes an exit code.

0: done. 1: it failed on the way. 2: wrong arguments or a missing extra. 130: ctrl-C.
What goes wrong is one line on standard error; standard output holds results only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from unisono.errors import MissingExtraError

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the terminal program.

    Args:
        arguments: What follows the program's name; the process's own by default.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # Here and not above: `import unisono.cli` must work without the extra `cli`.
        from unisono.commands.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {"typer", "rich", "click"}:
            raise
        return _complain(
            "unisono", 'the command line needs the extra `cli`: pip install "unisono[cli]"', 2
        )
    return _run(app, given)


def _run(app: Callable[..., Any], arguments: list[str]) -> int:
    from unisono.commands.outcome import CommandError

    command = next((word for word in arguments if not word.startswith("-")), None)
    speaker = "unisono" if command is None else f"unisono {command}"
    try:
        code = app(args=arguments, prog_name="unisono", standalone_mode=False)
    except CommandError as error:
        return _complain(speaker, str(error), error.exit_code)
    except MissingExtraError as error:
        return _complain(speaker, str(error), 2)
    except KeyboardInterrupt:
        return _complain(speaker, "interrupted", _INTERRUPTED)
    except Exception as error:
        # typer's own complaints. Their class lives in click or, since typer 0.26, in a private
        # copy of it; this method is what both have in common.
        if not hasattr(error, "format_message"):
            raise
        return _complain(_speaker_of(error), error.format_message(), 2)
    # typer turns a KeyboardInterrupt that reaches it into this code.
    if code == _INTERRUPTED:
        return _complain(speaker, "interrupted", _INTERRUPTED)
    return code if isinstance(code, int) else 0


def _speaker_of(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return getattr(context, "command_path", None) or "unisono"


def _complain(speaker: str, message: str, code: int) -> int:
    from unisono.commands.printable import printable

    line = printable(" ".join(message.split()))  # one line, whatever a cause contains
    sys.stderr.write(f"{speaker}: {line}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
