"""A member that is nothing but a chain of torch's own layers, without template and member axis.

What such a forward does is known, so its steps take the stacked tensors as they are. For small
networks the rest of a call, around the user's own forward, costs more than their arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from unisono.engine.axis import Operand, has_global_hooks, is_end_of_recomputation
from unisono.engine.inputs import PerMember
from unisono.engine.kernels import is_outside
from unisono.engine.parts import Call, Result, call_member
from unisono.engine.template import Template


def straight(template: Template, values: Sequence[Any], call: Call) -> Result | None:
    """The result of a call ``ens(x)``; None where the member has to run as it is written."""
    chain = template.chain
    if chain is None or call.fn is not call_member or call.kwargs or len(call.args) != 1:
        return None
    (arg,) = call.args
    is_marked = type(arg) is PerMember
    x = arg.tree if is_marked else arg
    if type(x) is not Tensor or not is_outside() or has_global_hooks():
        return None
    try:
        with template.lent(values):
            found = chain.whole(call.n, (x, 0 if is_marked else None), _stacked)
    except Exception as error:
        if is_end_of_recomputation(error):
            raise
        return None  # the layers one by one will say which of them is wrong
    if found is None:
        return None
    value, dim = found
    if dim is None:  # the same for all members; a copy, so that each can be written to
        return Result(value.expand(call.n, *value.shape).clone(), [])
    return Result(value.movedim(dim, 0) if dim else value, [])


def _stacked(tensor: Tensor) -> Operand:
    return tensor, 0
