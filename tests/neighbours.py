"""Somebody else's use of torch.vmap in the same process; must not import unisono."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ops_of_plain_vmap() -> list[str]:
    """Names of the ops that torch runs for a few layers under its own vmap."""
    layers = [
        (nn.Linear(4, 2), (5, 4)),
        (nn.Conv2d(2, 3, 3, padding=1), (5, 2, 6, 6)),
        (nn.BatchNorm1d(4).eval(), (5, 4)),
    ]
    names = []
    for layer, shape in layers:
        parameters, buffers = torch.func.stack_module_state([layer] * 3)

        def call(p: object, b: object, x: Tensor, layer: nn.Module = layer) -> Tensor:
            return torch.func.functional_call(layer, (p, b), (x,))

        with torch.profiler.profile() as profile:
            torch.vmap(call, (0, 0, None))(parameters, buffers, torch.zeros(shape))
        names += [event.name for event in profile.events() if event.name.startswith("aten::")]
    return names
