"""What the user is told when a call can't run for all members at once: where, why, and the edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from unisono.engine.opbyop.detour import Detour
from unisono.engine.opbyop.fallback import MembersDisagree
from unisono.engine.parts import Call
from unisono.engine.template import Template
from unisono.engine.where import first_sentence, locate

_CONDITION: Final = (
    "keep it a tensor: torch.where(condition, a, b) instead of `if`, and no .item() or .tolist()"
)
_MASK: Final = "use torch.where(mask, a, b) instead of x[mask]"
_FRESH: Final = "create the tensor from an input: x.new_zeros(...) instead of torch.zeros(...)"
_FUNCTION: Final = (
    "write setup_context and vmap for it, see"
    " https://docs.pytorch.org/docs/main/notes/extending.func.html"
)

# Parts of an op's name, or of torch's message, and the edit that helps. The first one counts.
_REMEDIES: Final = (
    (("boolean mask", "nonzero", "masked_select", "torch.where", "argwhere"), _MASK),
    (("setup_context", ".apply", "vmap staticmethod"), _FUNCTION),
    ((".item", ".tolist", "__bool__", "__int__", "__float__", "__index__"), _CONDITION),
    (("control flow", "numpy", "equal", "allclose", "with a slice"), _CONDITION),
    (("inplace", "inplace randomness", "in-place"), _FRESH),
    (("out=",), "call it without out="),
    (("requires_grad_",), "call requires_grad_() on the input before the call, or use torch.func"),
    (("dynamic shape",), _MASK),
)
_SHOWN: Final = 5


def fallback_text(template: Template, call: Call, reason: Exception) -> str:
    """The warning for a call that runs by loop from now on."""
    if isinstance(reason, MembersDisagree):
        where, why = _place(reason.detour), f"{reason.detour.op}: {reason.detour.reason}"
    else:
        where, why = locate(reason, template.module), _first_line(reason)
    return (
        f"{_ensemble(template, call)}: {where} can't run for all members at once, so this call"
        f' runs member by member from now on (strategy "loop").'
        f"\n  reason: {why}"
        f"\n  remedy: {remedy_for(why) or f'rewrite {where} with batched operations'};"
        f' strategy="loop" says that the loop is fine, strategy="fused" makes this an error'
    )


def detour_text(
    template: Template, call: Call, detours: Sequence[Detour], reason: Exception
) -> str:
    """The warning for a call that runs op by op from now on.

    Args:
        template: What ran.
        call: What ran.
        detours: The ops that ran for one member after another; none if it was enough that each
            member got tensors of its own to write to.
        reason: Why the call can't run without.
    """
    where, why = locate(reason, template.module), _first_line(reason)
    ops = [
        f"\n  {_place(d)}: {d.op}, for one member after another\n    reason: {d.reason}"
        f"\n    remedy: {remedy_for(f'{d.op}: {d.reason}') or 'rewrite it with other operations'}"
        for d in detours[:_SHOWN]
    ]
    if len(detours) > _SHOWN:
        ops.append(f"\n  ... and {len(detours) - _SHOWN} more")
    if not ops:
        remedy = remedy_for(why) or "make them from an input"
        own = "every member gets its own copy of the inputs and of the tensors made there"
        ops = [f"\n  {where}: {own}\n    reason: {why}\n    remedy: {remedy}"]
    return (
        f"{_ensemble(template, call)}: forward can't run for all members at once as it stands; from"
        f" now on it runs at once except for this:{''.join(ops)}"
        f'\n  strategy="loop" runs all of it member by member and says nothing'
    )


def _ensemble(template: Template, call: Call) -> str:
    return f"Ensemble of {call.n} {type(template.module).__name__}"


def _place(detour: Detour) -> str:
    return f"{detour.path}, {detour.line}" if detour.line else detour.path


def _first_line(reason: Exception) -> str:
    return f"{type(reason).__name__}: {first_sentence(str(reason))}"


def remedy_for(text: str) -> str:
    """The edit that helps against what a message of torch says; empty if none is known."""
    return next((edit for parts, edit in _REMEDIES if any(part in text for part in parts)), "")
