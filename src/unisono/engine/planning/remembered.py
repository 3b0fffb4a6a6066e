"""The plans made in this process, by what they are for: an ensemble's make and a signature."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from unisono.engine.planning.plan import Plan

_plans: dict[str, Plan] = {}
_lock = threading.Lock()


def recall(key: str) -> Plan | None:
    """The plan that was made or loaded under this key."""
    return _plans.get(key)


def remember(plans: Mapping[str, Plan]) -> None:
    """Keep plans; one that is there is replaced."""
    with _lock:
        _plans.update(plans)


def everything() -> dict[str, Plan]:
    """All plans, in a dict of its own."""
    with _lock:
        return dict(_plans)


def forget() -> None:
    """Start anew."""
    with _lock:
        _plans.clear()
