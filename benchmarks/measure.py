"""Equality first, then time in turns, then memory."""

from __future__ import annotations

import gc
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import LOOP, Contender, NotApplicableError

TURN_SECONDS = 0.02  # long against the clock, short against the machine's moods
MIN_ROUNDS = 9
TOLERANCE = 1e-3  # in float32
EXACT_TOLERANCE = 1e-7  # in float64


@dataclass
class Times:
    """One contender in one scenario.

    Args:
        seconds: Per call, one value for each round; empty if it was not timed.
        reason: Why it was not.
        note: Of the contender.
    """

    seconds: list[float] = field(default_factory=list)
    reason: str = ""
    note: str = ""

    @property
    def median(self) -> float:
        """In seconds; NaN if it was not timed."""
        return float(np.median(self.seconds)) if self.seconds else float("nan")

    def summary(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        if not self.seconds:
            return {"reason": self.reason}
        low, high = np.percentile(self.seconds, [25, 75])
        return {
            "median": self.median,
            "min": min(self.seconds),
            "iqr": float(high - low),
            "rounds": len(self.seconds),
            "note": self.note,
            "seconds": self.seconds,
        }


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in the block after so many seconds; no limit if it is 0."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than {seconds:.0f} s to start")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def prepare(
    makers: Mapping[str, Callable[[], Contender]],
    exact: Callable[[str], Contender],
    *,
    seconds: float,
) -> tuple[dict[str, Contender], dict[str, Times]]:
    """Make the contenders and compare each with the loop.

    Batch norm of few values magnifies rounding until gradients in float32 have little to do with
    each other. A contender that differs there is compared once more in float64.

    Args:
        makers: Name -> makes the contender; the loop is the first.
        exact: Makes the contender of that name in float64.
        seconds: What a contender may take to be made and to run for the first time.

    Returns:
        The contenders that computed what the loop computes, and the others with the reason.
    """
    ready: dict[str, Contender] = {}
    out: dict[str, Times] = {}
    truth = makers[LOOP]()
    wanted = results(truth)
    for name, make in makers.items():
        try:
            with at_most(seconds if name != LOOP else 0), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                contender = truth if name == LOOP else make()
                found = results(contender)
                try:
                    assert_equal(found, wanted, TOLERANCE)
                except AssertionError:
                    if any(tensor.isnan().any() for tensor in found.values()):
                        raise
                    assert_equal(results(exact(name)), results(exact(LOOP)), EXACT_TOLERANCE)
        except NotApplicableError as error:
            out[name] = Times(reason=str(error))
        except Exception as error:
            out[name] = Times(reason=f"{type(error).__name__}: {_first_line(error)}")
        else:
            ready[name] = contender
    return ready, out


def results(contender: Contender) -> dict[str, Tensor]:
    """The outputs of a run and, in training, the gradients."""
    for _ in range(contender.checked_runs):
        result = contender.run()
    found = {"outputs": contender.outputs(result).detach()}
    for name, gradient in contender.gradients().items():
        if gradient is not None:
            found[f"gradients of {name}"] = gradient
    return found


def assert_equal(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Compare outputs and gradients; the tolerance is relative to the greatest value of each.

    Raises:
        AssertionError: If the two differ.
    """
    greatest = max(float(want.abs().max()) for want in wanted.values())
    for what, want in wanted.items():
        assert what in got, f"no {what}"
        own = got[what]
        assert own.shape == want.shape, f"{what}: {tuple(own.shape)}, not {tuple(want.shape)}"
        scale = max(float(want.abs().max()), 1e-3 * greatest)
        error = float((own - want).abs().max()) / scale
        assert error <= tolerance, f"{what} differ by {error:.1e}, relative to the greatest"


def time_in_turns(
    contenders: Mapping[str, Contender], *, rounds: int, seconds: float
) -> dict[str, Times]:
    """Time each contender once per round: A B C, A C B, C A B, ...

    The order rotates and turns round, so that nobody has always the same one before it.

    Args:
        contenders: What to time; each has run before.
        rounds: How often at most each has its turn; at least `MIN_ROUNDS` times.
        seconds: Time budget; fewer rounds if they wouldn't fit.

    Returns:
        The times of each.
    """
    names = list(contenders)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = {name: _turns(contenders[name].run) for name in names}
        cost = sum(once * count for once, count in calls.values())
        rounds = min(rounds, max(MIN_ROUNDS, int(seconds / cost)))
        times = {name: Times(note=contenders[name].note) for name in names}
        gc.collect()
        gc.disable()
        try:
            for r in range(rounds):
                first = r % len(names)
                order = names[first:] + names[:first]
                for name in reversed(order) if r % 2 else order:
                    once = _timed(contenders[name].run, calls[name][1])
                    times[name].seconds.append(once)
        finally:
            gc.enable()
    return times


def peak_memory(run: Callable[[], Any]) -> int:
    """The most bytes of new CPU memory that are alive at one moment of a call.

    Every event of torch's CPU allocator counts, also those inside of kernels.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = run()
    del result
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def _turns(run: Callable[[], Any]) -> tuple[float, int]:
    """Seconds of a call, and how many calls make up a turn."""
    once = _timed(run, 2)
    return once, max(1, round(TURN_SECONDS / once))


def _timed(run: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        run()
    return (time.perf_counter() - start) / count


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else ""
