"""Which strategy runs a call, what it leaves behind, and what is put back when one fails."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal

import torch

from unisono.engine import rng
from unisono.engine.attention import NativeAttentionOff
from unisono.engine.call import Strategy, fused, in_chunks, loop, vmap
from unisono.engine.parts import Call, Result
from unisono.engine.pool import Pool
from unisono.engine.store import store
from unisono.engine.template import Template
from unisono.engine.where import caller_level, locate
from unisono.errors import EnsembleWarning

StrategyName = Literal["auto", "fused", "vmap", "loop"]
STRATEGIES: Final[Mapping[str, Strategy]] = {"fused": fused, "vmap": vmap, "loop": loop}


class Planner:
    """Runs the calls of one ensemble and remembers which strategy works for which.

    ``auto`` is ``fused``, and ``loop`` for what can't run for all members at once.

    Args:
        pool: The templates of the ensemble.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._fuses: set[tuple[object, bool]] = set()
        self._needs_loop: set[tuple[object, bool]] = set()
        self._runs_in_eval: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """All but the choices: they are keyed by code objects, which can't be pickled."""
        return {**vars(self), "_fuses": set(), "_needs_loop": set()}

    def run(self, call: Call, strategy: StrategyName, chunk_size: int | None) -> Any:
        """The outputs of ``call`` for all members; what ``forward`` assigned is stored."""
        if strategy in ("auto", "fused") and torch.compiler.is_compiling():
            strategy = "vmap"  # Dynamo can't trace our driver, but knows torch.vmap
        template = self.pool.take()
        try:
            values = template.values()
            if strategy == "auto":
                result = self._run_auto(template, values, call, chunk_size)
            else:
                result = self._run_one(strategy, template, values, call, chunk_size)
            if result.assigned:
                store(self.pool, template, result.assigned, call.n)
        finally:
            self.pool.give_back(template)
        return result.outputs

    def _run_auto(
        self, template: Template, values: Sequence[Any], call: Call, chunk_size: int | None
    ) -> Result:
        signature = (_kind_of(call.fn), template.is_training)
        if signature in self._needs_loop:
            return self._run_one("loop", template, values, call, chunk_size)
        is_new = signature not in self._fuses
        state = rng.get_state(rng.devices_of(values)) if is_new else None
        try:
            result = self._run_one("fused", template, values, call, chunk_size)
        except Exception as error:
            reason = error
        else:
            if is_new:
                self._fuses.add(signature)
            return result
        if state is not None:
            rng.set_state(state)
        # If the members fail one by one, too, it is their own error that the user has to see.
        result = self._run_one("loop", template, values, call, chunk_size)
        self._needs_loop.add(signature)
        warnings.warn(
            _fallback_text(template, call, reason), EnsembleWarning, stacklevel=caller_level()
        )
        return result

    def _run_one(
        self,
        name: Literal["fused", "vmap", "loop"],
        template: Template,
        values: Sequence[Any],
        call: Call,
        chunk_size: int | None,
    ) -> Result:
        """Run one strategy; if it fails, the buffers are put back."""
        strategy = STRATEGIES[name]
        if chunk_size is not None and chunk_size < call.n and name != "loop":
            strategy = in_chunks(strategy, chunk_size)
        # In eval mode hardly any model writes its buffers: once it has run it is trusted.
        is_known = not template.is_training and name in self._runs_in_eval
        native: AbstractContextManager[None] = nullcontext()
        if template.has_attention and name != "loop" and torch.is_grad_enabled():
            native = NativeAttentionOff()
        before = [] if is_known else _copies_of_buffers(template, values)
        try:
            with native:
                result = strategy(template, values, call)
        except BaseException:
            with torch.no_grad():
                for buffer, copy in before:
                    buffer.copy_(copy)
            raise
        if not template.is_training:
            self._runs_in_eval.add(name)
        return result


def _kind_of(fn: Any) -> object:
    """What stays the same where a caller makes the same function anew for each call."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return getattr(fn, "__code__", type(fn))


def _copies_of_buffers(
    template: Template, values: Sequence[Any]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (value, value.clone())
        for slot, value in zip(template.slots, values, strict=True)
        if slot.kind == "buffer" and isinstance(value, torch.Tensor)
    ]


def _fallback_text(template: Template, call: Call, reason: Exception) -> str:
    where = locate(reason, template.module)
    return (
        f"Ensemble of {call.n} {type(template.module).__name__}: {where} can't run for all"
        f' members at once, so this call runs member by member from now on (strategy "loop").'
        f"\n  reason: {type(reason).__name__}: {str(reason).splitlines()[0] if str(reason) else ''}"
        f'\n  remedy: rewrite {where} with batched operations; strategy="loop" says that the'
        f' loop is fine, strategy="fused" makes this an error'
    )
