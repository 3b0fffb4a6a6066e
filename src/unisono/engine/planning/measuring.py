"""Make a plan: time the ways in which a call can run, on that very call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from unisono.engine.axis import is_observed
from unisono.engine.inputs import tensors_in
from unisono.engine.parts import Call
from unisono.engine.planning.contest import contest
from unisono.engine.planning.plan import Candidate, MemoryFormat, Plan
from unisono.engine.planning.rehearsal import Rehearsal
from unisono.engine.planning.running import run
from unisono.engine.planning.storage import current_format, formats_of, is_free
from unisono.engine.template import Template
from unisono.engine.tree import leaves
from unisono.errors import UnsupportedModelError

# Ways whose times differ by no more than these factors count as equally fast: two ways to run, and
# two orders of the parameters in memory, of which the second means to move them.
_TIE, _TIE_OF_FORMATS = 1.015, 1.03
# Chunks are for calls whose memory costs more than it has to, where they win by much. Elsewhere
# they are the same ops in smaller pieces, as fast but for noise, and in training gradients to join.
_HANDICAP_OF_CHUNKS = 1.1


def why_not_measured(template: Template, call: Call) -> str:
    """Why nothing may be timed on this call; empty if it may."""
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for, and timing is not deterministic"
    if is_observed():
        return "the call runs inside a transform or under hooks that see every op"
    values = [leaf for _, leaf in leaves(template.values()) if isinstance(leaf, Tensor)]
    tensors = [*values, *tensors_in(call.args, call.kwargs)]
    if any(type(t) not in (Tensor, nn.Parameter) or t.device.type == "meta" for t in tensors):
        return "the tensors are of a kind that can't be timed (fake, distributed, meta)"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return ""


def measure(
    template: Template, call: Call, chunk_size: int | None, *, op_by_op: bool = False
) -> Plan:
    """Time the candidates and choose.

    Args:
        template: Runs them.
        call: The call.
        chunk_size: How many members may run at once; None for all.
        op_by_op: Whether some op can't run for all members at once.

    Raises:
        Exception: What ``fused`` raises, if it can't run this call.
    """
    rehearsal = Rehearsal(template, call)
    stored = current_format(template)
    candidates = {
        way.name(stored): way for way in _candidates(template, call.n, chunk_size, stored)
    }
    first: dict[str, float] = {}

    def seconds(name: str) -> float:
        way = candidates[name]
        strategy = partial(run, _plan(way, "", op_by_op=op_by_op))
        return rehearsal.seconds(strategy, way.memory_format)

    # What a process pays once (libraries to load, threads to start) is no way's own time.
    seconds(next(iter(candidates)))
    for name, way in candidates.items():
        try:
            first[name] = seconds(name)
        except Exception:
            if way.strategy == "fused" and way.memory_format == stored:
                raise
            # A way that can't run this call is none; another one will do.
    handicaps = {
        name: _HANDICAP_OF_CHUNKS
        for name, way in candidates.items()
        if way.chunk_size is not None and way.chunk_size != chunk_size
    }
    times = contest(first, seconds, handicaps)
    told = {name: time * handicaps.get(name, 1.0) for name, time in times.items()}
    best = _choose(template, candidates, told, stored)
    plan = _plan(best, _reason(best, times, stored), op_by_op=op_by_op)
    return replace(plan, candidates=times)


def measure_either_way(
    template: Template, call: Call, chunk_size: int | None
) -> tuple[Plan, Exception | None]:
    """A measured plan; op by op, and why, if the members can't all run at once.

    If they can't be timed so either, the call itself will show what is wrong.
    """
    failure: Exception | None = None
    for op_by_op in (False, True):
        try:
            return measure(template, call, chunk_size, op_by_op=op_by_op), failure
        except UnsupportedModelError as error:
            failure = error
            break
        except Exception as error:
            failure = failure or error
    return Plan("fused", chunk_size, "it could not be timed"), failure


def _plan(way: Candidate, reason: str, *, op_by_op: bool) -> Plan:
    return Plan(
        way.strategy,
        way.chunk_size,
        reason,
        memory_format=way.memory_format,
        op_by_op=op_by_op and way.strategy == "fused",
    )


def _candidates(
    template: Template, n: int, chunk_size: int | None, stored: MemoryFormat
) -> list[Candidate]:
    """The ways worth timing, the one to fall back on first."""
    formats = [stored]
    if stored == "contiguous":
        formats = list(formats_of(template))
    ways = [Candidate("fused", chunk_size, stored), Candidate("loop", None, stored)]
    if not _is_wrong_under_vmap(template):
        ways.append(Candidate("vmap", chunk_size, stored))
    for memory_format in formats[1:]:
        ways.append(Candidate("fused", chunk_size, memory_format))
        if memory_format == "channels_last":
            ways.append(Candidate("loop", None, memory_format))
    if chunk_size is None and n >= 4:
        ways.append(Candidate("fused", -(-n // 2), formats[-1]))
    return ways


def _is_wrong_under_vmap(template: Template) -> bool:
    """Whether torch's own batching rules would give this member a wrong gradient.

    With indices per member they forget the ``padding_idx`` of an embedding in backward.
    """
    modules = template.module.modules()
    return any(isinstance(m, nn.Embedding) and m.padding_idx is not None for m in modules)


def _choose(
    template: Template,
    candidates: Mapping[str, Candidate],
    times: Mapping[str, float],
    stored: MemoryFormat,
) -> Candidate:
    """The fastest; all members at once, and parameters as they are stored, where it's a tie."""
    ranked = [candidates[name] for name in sorted(times, key=times.__getitem__)]
    first = candidates[next(iter(candidates))]
    here = next(way for way in ranked if way.memory_format == stored)
    if times[first.name(stored)] <= _TIE * times[here.name(stored)]:
        here = first
    best = ranked[0]
    tie = _TIE_OF_FORMATS * times[best.name(stored)]
    if best.memory_format == stored or times[here.name(stored)] <= tie:
        return here
    return best if is_free(template, best.memory_format) else here


def _reason(best: Candidate, times: Mapping[str, float], stored: MemoryFormat) -> str:
    chosen = best.name(stored)
    others = [
        f"{times[name] / times[chosen]:.2f}x as fast as {name}"
        for name in ("loop", "vmap")
        if name in times and name != chosen
    ]
    fastest = min(times, key=times.__getitem__)
    what = "the fastest"
    if times[chosen] > _HANDICAP_OF_CHUNKS * times[fastest]:
        what = "the fastest that leaves the parameters where they are, since others hold them,"
    elif chosen != fastest:
        what = f"about as fast as {fastest}, and simpler,"
    text = f"{what} when the first call of this kind was timed"
    return f"{text}: {', '.join(others)}" if others else text
