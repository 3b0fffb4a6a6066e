"""Time several ways to do one thing, within a bounded number of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

BUDGET: Final = 11
"""All runs together take at most as long as this many runs of the slowest contestant: with the one
to get warm, twelve."""

# Before each round those leave that took longer than this many times the best. The first run is
# judged mildly: it may contain what is paid once (fresh memory, kernels that are chosen). The last
# rounds are between those that a single disturbed run could put in the wrong order.
_STAYS: Final = (4.0, 2.0, 1.5, 1.3, 1.2, *[1.1] * 7)


def contest(
    first: Mapping[str, float],
    run: Callable[[str], float],
    handicaps: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The least seconds that each contestant took, fastest first.

    They take turns, so that a disturbance meets all of them, and the slow ones leave early, as
    soon as what is left of the budget isn't enough for one more run of each and another of two.

    Args:
        first: What the first run of each took.
        run: Runs one contestant again and returns the seconds it took.
        handicaps: By which factor a contestant has to be faster than the others to go on.
    """
    handicaps = handicaps or {}
    most = BUDGET * max(first.values())
    spent = sum(first.values())
    best = dict(first)
    running = list(first)
    for stays in _STAYS:
        running = _ranked(running, best, handicaps, stays)
        while len(running) > 2 and _seconds_of(running, best) > most - spent:
            running.pop()
        for name in running:
            if spent + best[name] > most:
                return _sorted(best)
            time = run(name)
            spent += time
            best[name] = min(time, best[name])
        if len(running) == 1:
            break
    return _sorted(best)


def _ranked(
    running: list[str], best: Mapping[str, float], handicaps: Mapping[str, float], stays: float
) -> list[str]:
    """Those that go on, the best first; with a handicap only if it is the best of all."""
    told = {name: best[name] * handicaps.get(name, 1.0) for name in running}
    leader = min(told.values())
    limits = {name: leader * (1.0 if name in handicaps else stays) for name in running}
    return sorted((n for n in running if told[n] <= limits[n]), key=told.__getitem__)


def _seconds_of(running: list[str], best: Mapping[str, float]) -> float:
    """What a round of all takes, and one of the first two after it."""
    return sum(best[name] for name in [*running, *running[:2]])


def _sorted(times: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: item[1]))
