"""Time several ways to do one thing, within a bounded number of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

BUDGET: Final = 11
"""All runs together take at most as long as this many runs of the slowest contestant: with the one
to get warm, twelve."""

# Before each round those leave that took longer than this many times the best. The first run is
# judged mildly: it may contain what is paid once (fresh memory, kernels that are chosen).
_STAYS: Final = (4.0, 2.0, 1.5, 1.3, 1.2)


def contest(first: Mapping[str, float], run: Callable[[str], float]) -> dict[str, float]:
    """The least seconds that each contestant took, fastest first.

    They take turns, so that a disturbance meets all of them, and the slow ones leave early.

    Args:
        first: What the first run of each took.
        run: Runs one contestant again and returns the seconds it took.
    """
    spent = sum(first.values())
    best = dict(first)
    running = list(first)
    for stays in _STAYS:
        limit = stays * min(best[name] for name in running)
        running = sorted((name for name in running if best[name] <= limit), key=best.__getitem__)
        for name in running:
            if spent + best[name] > BUDGET * max(best.values()):
                return _sorted(best)
            time = run(name)
            spent += time
            best[name] = min(time, best[name])
        if len(running) == 1:
            break
    return _sorted(best)


def _sorted(times: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: item[1]))
