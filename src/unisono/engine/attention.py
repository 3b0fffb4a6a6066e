"""Keep torch's native attention out of a call that may need gradients.

In eval mode ``nn.MultiheadAttention`` and the Transformer layers take a fused path that has no
derivative. They avoid it when a tensor requires a gradient, which inside the member axis none
seems to do. Without gradients it is welcome: there is a rule for it.
"""

from __future__ import annotations

import threading

import torch
from torch import nn

from unisono.engine.leaf import LayerForward
from unisono.engine.leaf_attention import AttentionForward

_MODULES = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def has_attention(member: nn.Module) -> bool:
    """Whether the member has modules with a native path."""
    return any(isinstance(module, _MODULES) for module in member.modules())


def native_layers(member: nn.Module) -> list[nn.Module]:
    """The member's outermost modules that torch may run as one op in eval mode."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in member.modules():
        if isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer):
            forward = vars(module).get("forward")
            is_own = forward is None or isinstance(forward, LayerForward | AttentionForward)
            if id(module) not in inside and not module.training and is_own:
                found.append(module)
            inside.update(map(id, module.modules()))
    return found


class NativeAttentionOff:
    """Switch the native path off for the time of a ``with`` block.

    The switch is one for the process, so the first call to enter remembers how it stood and the
    last one to leave puts it back. Plain models that run meanwhile take the slower path, to the
    same result.
    """

    _lock = threading.Lock()
    _inside = 0
    _was_on = True

    def __enter__(self) -> None:
        kind = NativeAttentionOff
        with kind._lock:
            if kind._inside == 0:
                kind._was_on = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            kind._inside += 1

    def __exit__(self, *_: object) -> None:
        kind = NativeAttentionOff
        with kind._lock:
            kind._inside -= 1
            if kind._inside == 0:
                torch.backends.mha.set_fastpath_enabled(kind._was_on)
