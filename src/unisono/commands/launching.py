"""Several processes for one command, started and watched by PyTorch's launcher."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, TypeVar

from unisono.commands.outcome import CommandError, Interrupted

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_RESTARTS: Final = 3  # of all processes, when one was killed
_INTERRUPTED: Final = 130
_LOG_LEVEL: Final = "LOGLEVEL"  # what torch's launcher takes its level from
_LOGGERS: Final = (
    "torch.distributed.elastic.agent.server.api",
    "torch.distributed.elastic.multiprocessing.api",
    "torch.multiprocessing.spawn",
)

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def launch(work: Callable[[Argument], Result], argument: Argument, processes: int) -> list[Result]:
    """Give ``work(argument)`` of each process, started as by ``torchrun --standalone``.

    When one of them is killed, all are started anew, three times at most.

    Args:
        work: A function of a module, which the processes import.
        argument: What it gets.
        processes: How many.

    Raises:
        KeyboardInterrupt: On ctrl-C, when all processes have ended.
        CommandError: If one was killed more often than that.
        RuntimeError: If one raised; with its traceback.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with (
        tempfile.TemporaryDirectory(prefix="unisono-") as logs,
        _signals_put_back(),
        _quiet_launcher(),
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=_RESTARTS,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            found = elastic_launch(config, _interruptible)(work, argument)
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise CommandError(f"ended by {signal.Signals(error.sigval).name}") from None
        except ChildFailedError as error:
            raise _explained(error, processes) from error
    return [found[rank] for rank in range(processes)]


def _explained(error: ChildFailedError, processes: int) -> Exception:
    """What became of a process: killed, or an error that nobody expected, with its traceback."""
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        return CommandError(
            f"process {rank} of {processes} was ended by {failure.signal_name()}, after "
            f"{_RESTARTS} times that all were started anew; what is finished is kept, and the same "
            "command goes on from there"
        )
    told = failure.message
    if isinstance(told, dict):
        told = told["extraInfo"]["py_callstack"]
    return RuntimeError(f"process {rank} of {processes} ended with {failure.exitcode}:\n{told}")


def _interruptible(work: Callable[[Argument], Result], argument: Argument) -> Result:
    """Work until ctrl-C; in a terminal it comes twice, once from the launcher."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        return work(argument)
    except (KeyboardInterrupt, Interrupted):
        raise SystemExit(_INTERRUPTED) from None


@contextlib.contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Leave out its lines on every signal and process, unless the user asked for them.

    What there is to know of them becomes the error of the command, or a note in its report.
    """
    if _LOG_LEVEL in os.environ:
        yield
        return
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _signals_put_back() -> Iterator[None]:
    """Undo what the launcher does to the handlers of signals."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in known}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
