"""Which strategy a capture records: the one whose program is faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any, Final

import torch

from unisono.engine import rng
from unisono.engine.capture.record import Recording, Request, Sample, Variant, record
from unisono.engine.template import Template

# A loop over many members is long to write and slow to run; it is given up at this length.
_MAX_OPS_OF_LOOP: Final = 3000
_ROUNDS: Final = 7
_SECONDS: Final = 0.3


def record_fastest(
    template: Template, request: Request, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Recording, Sample]:
    """Record by the strategy that the ensemble names; for ``"auto"`` by the fastest.

    Raises:
        UnsupportedModelError: If the call can't be replayed.
    """
    name = "fused" if request.strategy == "auto" else request.strategy
    try:
        candidates = [record(name, template, request, args, kwargs)]
    except Exception:
        if request.strategy != "auto":
            raise
        # If the members fail one by one, too, it is their own error that the user has to see.
        return record("loop", template, request, args, kwargs)
    variants = [(name, Variant(turned=True))] if candidates[0][1].can_turn else []
    variants += [("loop", Variant(_MAX_OPS_OF_LOOP))] if request.strategy == "auto" else []
    for other, variant in variants:
        # What fails here has succeeded above, and can do without.
        with suppress(Exception):
            candidates.append(record(other, template, request, args, kwargs, variant))
    if len(candidates) == 1:
        return candidates[0]
    times = _measure(candidates)
    return candidates[times.index(min(times))]


def _measure(candidates: Sequence[tuple[Recording, Sample]]) -> list[float]:
    """The shortest time of each, run in turns; buffers and random state are put back."""
    replays = [recording.bind() for recording, _ in candidates]
    best = [float("inf")] * len(replays)
    state = rng.get_state(rng.devices_of(candidates[0][1].inputs))
    start = perf_counter()
    for k in range(_ROUNDS):
        for i, (replay, (_, sample)) in enumerate(zip(replays, candidates, strict=True)):
            assert replay is not None, "the weights changed while a call was recorded"
            best[i] = min(best[i], _seconds(replay, sample))
        if k > 0 and perf_counter() - start > _SECONDS:
            break
    rng.set_state(state)
    return best


def _seconds(replay: Callable[..., Any], sample: Sample) -> float:
    _wait(sample)
    start = perf_counter()
    replay(*sample.inputs)
    _wait(sample)
    end = perf_counter()
    sample.put_back()
    return end - start


def _wait(sample: Sample) -> None:
    if any(x.device.type == "cuda" for x in sample.inputs):
        torch.cuda.synchronize()
