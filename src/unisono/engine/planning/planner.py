"""Which way a call runs: look up or make its plan, and what to do when a way fails."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from unisono.engine import rng
from unisono.engine.axis import is_end_of_recomputation
from unisono.engine.often import Often
from unisono.engine.opbyop.detour import Detour
from unisono.engine.opbyop.remedies import detour_text, fallback_text
from unisono.engine.parts import Call, Result
from unisono.engine.planning.chunking import chunk_within, sizes_of
from unisono.engine.planning.explain import ops_of
from unisono.engine.planning.heap import keep_freed_memory
from unisono.engine.planning.measuring import measure_either_way, why_not_measured
from unisono.engine.planning.plan import MemoryFormat, Plan, RunName, StrategyName
from unisono.engine.planning.remembered import recall, remember
from unisono.engine.planning.running import kept, run, run_or_restore
from unisono.engine.planning.signature import (
    Signature,
    as_text,
    fingerprint,
    kind_of,
    quick_key,
    signature_of,
)
from unisono.engine.planning.storage import (
    adopt,
    current_format,
    demanded_format,
    formats_of,
    is_free,
)
from unisono.engine.pool import Pool
from unisono.engine.store import store
from unisono.engine.template import Template
from unisono.engine.traced.call import run_traced
from unisono.engine.traced.exported import notes_ops, run_exported
from unisono.engine.where import caller_level, locate
from unisono.errors import EnsembleWarning, UnsupportedModelError

ChunkSize = int | Literal["auto"] | None
_MOST_RECENT = 256


class Options(NamedTuple):
    """How the ensemble was asked to run its calls."""

    strategy: StrategyName
    chunk_size: ChunkSize
    memory_limit: int | None


class Choice(NamedTuple):
    """The plan for a call, and what calls like it are remembered by."""

    signature: Signature
    plan: Plan
    is_new: bool = False
    failure: Exception | None = None  # why some op can't run for all members at once

    @property
    def forbids_loop(self) -> bool:
        """Whether ``strategy="fused"`` was asked for, which raises rather than loops."""
        return isinstance(self.signature[0], Options)


class Planner:
    """Runs the calls of one ensemble, and remembers how those of each kind run best.

    Args:
        pool: The templates of the ensemble.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._start()

    def _start(self) -> None:
        self._plans: dict[Signature, Plan] = {}
        self._recent: dict[Hashable, Choice] = {}
        self._chunks: dict[Hashable, int | None] = {}
        self._runs_in_eval: set[tuple[str, bool]] = set()
        self._fingerprint = ""
        self._often = Often()
        self._planning = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """The pool alone: plans are kept by code objects, which can't be pickled."""
        return {"pool": self.pool}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.pool = state["pool"]
        self._start()

    def run(self, call: Call, options: Options) -> Any:
        """The outputs of ``call`` for all members; what ``forward`` assigned is stored."""
        if torch.compiler.is_compiling():
            chunk_size = None if options.chunk_size == "auto" else options.chunk_size
            if notes_ops():
                return run_exported(self.pool, call, options.strategy, chunk_size)
            return run_traced(self.pool, call, options.strategy, chunk_size)
        may_replay = options.chunk_size is None and options.strategy in ("auto", "fused")
        if may_replay and (known := self._often.replayed(call)) is not None:
            return known[0]
        template = self.pool.take()
        try:
            values = template.values()
            if self.pool.rooms and not (template.is_training or torch.is_grad_enabled()):
                self.pool.rooms.clear()  # after training nobody waits for the next gradient
            choice = self._choice(template, values, call, options)
            is_due = may_replay and self._is_due(choice.plan, template, call)
            start = perf_counter()
            result = self._run_or_fall_back(choice, template, values, call)
            if result.assigned:
                store(self.pool, template, result.assigned, call.n)
            elif is_due:
                self._often.record(template, call, result.outputs, perf_counter() - start)
        finally:
            self.pool.give_back(template)
        return result.outputs

    def _is_due(self, plan: Plan, template: Template, call: Call) -> bool:
        """Whether this call is to be recorded, because such calls come often."""
        at_once = plan.strategy == "fused" and plan.chunk_size is None and not plan.op_by_op
        return at_once and self._often.is_due(template, call)

    def run_once(self, call: Call, options: Options) -> Any:
        """The outputs of a call of which nothing stays: no plan, and nothing that it writes."""
        chunk_size = None if options.chunk_size == "auto" else options.chunk_size
        name: RunName = "fused" if options.strategy == "auto" else options.strategy
        plan = Plan(name, chunk_size, "run once")
        template = self.pool.take()
        try:
            values = template.values()
            with kept(template, values):
                return run(plan, template, values, call).outputs
        finally:
            self.pool.give_back(template)

    def prepare(self, call: Call, options: Options) -> int | None:
        """How many members a call without gradients runs at once; None for all.

        The plan is made if there is none, so the parameters are stored as they are to stay.
        """
        template = self.pool.take()
        try:
            with torch.no_grad():
                choice = self._choice(template, template.values(), call, options)
        finally:
            self.pool.give_back(template)
        return choice.plan.chunk_size

    def keep_private(self, state: Mapping[Tensor, Any]) -> None:
        """Let parameters move in memory whatever else there is: nobody else holds them.

        For an ensemble that the library makes for itself, with its optimizer. Of others it can't
        know whether a wrapper has noted where they are.

        Args:
            state: What that optimizer keeps for each parameter; it moves along.
        """
        self.pool.only_state = state
        self.pool.renew()

    def store_for_training(self) -> None:
        """Store the parameters as it mostly pays, without measuring it, if they are free to move.

        For a named strategy whose digits are to repeat: what ``"auto"`` finds out may differ from
        run to run.
        """
        template = self.pool.take()
        try:
            memory_format = formats_of(template)[-1]
            if is_free(template, memory_format):
                self._adopt(template, memory_format)
        finally:
            self.pool.give_back(template)

    def explain(self, call: Call, options: Options) -> Plan:
        """The plan for calls like this one, made now if there is none, with the ops that run."""
        template = self.pool.take()
        try:
            choice = self._choice(template, template.values(), call, options)
            plan = choice.plan
            while True:
                plan = replace(plan, memory_format=current_format(template))
                try:
                    return replace(plan, ops=ops_of(plan, template, call))
                except Exception as error:
                    instead = _instead(plan, choice, error, template)
                    if instead is None:
                        raise
                    plan = instead
        finally:
            self.pool.give_back(template)

    def _run_or_fall_back(
        self, choice: Choice, template: Template, values: Sequence[Any], call: Call
    ) -> Result:
        state = rng.get_state(rng.devices_of(values)) if choice.is_new else None
        detours: list[Detour] = []
        try:
            result = self._run_one(choice.plan, template, values, call, detours)
        except Exception as error:
            if is_end_of_recomputation(error):
                raise
            failure = error
        else:
            if choice.is_new:
                self._replace(choice.signature, choice.plan)
                if choice.plan.op_by_op and choice.failure is not None:
                    _warn(detour_text(template, call, detours, choice.failure))
            return result
        # Not inside the except block: an error of the loop is no consequence of this one.
        return self._fall_back(choice, template, values, call, failure, state)

    def _choice(
        self, template: Template, values: Sequence[Any], call: Call, options: Options
    ) -> Choice:
        """The plan of a call, looked up or made."""
        chunk_size = options.chunk_size
        if chunk_size == "auto":
            chunk_size = self._chunk(template, call, options)
        if options.strategy != "auto":
            signature: Signature = (options, chunk_size, kind_of(call.fn), template.is_training)
            plan = self._plans.get(signature)
            if plan is not None:
                return Choice(signature, plan)
            keep_freed_memory()
            reason = f'strategy="{options.strategy}" was asked for'
            return Choice(signature, Plan(options.strategy, chunk_size, reason), is_new=True)
        home = next((value for value in values if isinstance(value, Tensor)), _NOWHERE)
        quick = quick_key(call, template.is_training, home, chunk_size)
        known = self._recent.get(quick)
        if known is not None:
            return known
        signature = (*signature_of(call, template.is_training, home), chunk_size)
        plan = self._plans.get(signature)
        if plan is None:
            return self._make_plan(signature, template, call, chunk_size)
        if quick is not None:
            if len(self._recent) >= _MOST_RECENT:
                self._recent.clear()
            self._recent[quick] = Choice(signature, plan)
        return Choice(signature, plan)

    def _make_plan(
        self, signature: Signature, template: Template, call: Call, chunk_size: int | None
    ) -> Choice:
        with self._planning:
            plan = self._plans.get(signature)
            if plan is not None:  # another thread was faster
                return Choice(signature, plan)
            why_not = why_not_measured(template, call)
            if why_not:
                by_rule = (*signature, "by rule")  # it may be measured another time
                plan = self._plans.get(by_rule)
                if plan is not None:
                    return Choice(by_rule, plan)
                reason = f"by rule all members at once: {why_not}"
                return Choice(by_rule, Plan("fused", chunk_size, reason), is_new=True)
            keep_freed_memory()
            if not self._plans:  # later the order of the parameters is settled
                self._adopt(template, demanded_format(template))
            key = self._key(signature, template)
            plan, failure = recall(key), None
            if plan is None or plan.op_by_op:  # what fails has to be found again, to be told
                plan, failure = measure_either_way(template, call, chunk_size)
                if plan.candidates:
                    remember({key: plan})
            if is_free(template, plan.memory_format):
                self._adopt(template, plan.memory_format)
            return Choice(signature, plan, is_new=True, failure=failure)

    def _adopt(self, template: Template, memory_format: MemoryFormat) -> None:
        self._often.forget()  # programs would keep the memory that the tensors leave
        adopt(template, memory_format)

    def _fall_back(
        self,
        choice: Choice,
        template: Template,
        values: Sequence[Any],
        call: Call,
        error: Exception,
        state: rng.RandomState | None,
    ) -> Result:
        """Run one by one what can't run for all members at once, and say so once."""
        first = error
        plan = _instead(choice.plan, choice, error, template)
        while plan is not None:
            detours: list[Detour] = []
            if state is not None:
                rng.set_state(state)
            try:
                result = self._run_one(plan, template, values, call, detours)
            except Exception as next_error:
                if plan.strategy == "loop":  # it is the members' own error, not one of fusing
                    raise
                error = next_error
                plan = _instead(plan, choice, error, template)
            else:
                self._replace(choice.signature, plan)
                by_loop = plan.strategy == "loop"
                _warn(
                    fallback_text(template, call, error)
                    if by_loop
                    else detour_text(template, call, detours, first)
                )
                return result
        raise error if isinstance(error, UnsupportedModelError) else first

    def _replace(self, signature: Signature, plan: Plan) -> None:
        self._plans[signature] = plan
        self._recent.clear()

    def _chunk(self, template: Template, call: Call, options: Options) -> int | None:
        key = (options, template.is_training, torch.is_grad_enabled(), sizes_of(call))
        if key not in self._chunks:
            name: RunName = "fused" if options.strategy == "auto" else options.strategy
            limit = options.memory_limit
            self._chunks[key] = chunk_within(limit, name, template, call)
        return self._chunks[key]

    def _key(self, signature: Signature, template: Template) -> str:
        if not self._fingerprint:
            self._fingerprint = fingerprint(self.pool.module, template)
        return f"{self._fingerprint}|{as_text(signature)}"

    def _run_one(
        self,
        plan: Plan,
        template: Template,
        values: Sequence[Any],
        call: Call,
        detours: list[Detour] | None = None,
    ) -> Result:
        """Run one way; if it fails, the buffers are put back."""
        if template.is_training:
            return run_or_restore(plan, template, values, call, detours)
        # In eval mode hardly any model writes its buffers: once it has run it is trusted.
        way = (plan.strategy, plan.op_by_op)
        if way in self._runs_in_eval:
            return run(plan, template, values, call, detours)
        result = run_or_restore(plan, template, values, call, detours)
        self._runs_in_eval.add(way)
        return result


_NOWHERE = torch.empty(0)


def _instead(plan: Plan, choice: Choice, error: Exception, template: Template) -> Plan | None:
    """The way to try when one has failed: op by op, then the loop unless it is forbidden."""
    if plan.strategy != "fused" or isinstance(error, UnsupportedModelError):
        return None
    where = locate(error, template.module)
    text = str(error).partition("\n")[0]
    reason = f"{where} can't run for all members at once: {type(error).__name__}: {text}"
    if not plan.op_by_op:
        return replace(plan, op_by_op=True, reason=reason, candidates={})
    if choice.forbids_loop:
        return None
    return Plan("loop", None, reason)


def _warn(text: str) -> None:
    warnings.warn(text, EnsembleWarning, stacklevel=caller_level())
