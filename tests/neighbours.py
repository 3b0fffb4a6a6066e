"""Somebody else's use of torch.vmap in the same process; must not import unisono."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


def results_of_plain_vmap() -> list[Tensor]:
    """Outputs and gradients of ops that unisono has rules for, under torch's own vmap."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).requires_grad_()

    calls = [
        (F.linear, (random(3, 5, 4), random(3, 2, 4), random(3, 2))),
        (F.conv2d, (random(3, 5, 2, 6, 6), random(3, 3, 2, 3, 3), random(3, 3))),
        (F.max_pool2d, (random(3, 5, 2, 6, 6), 2)),
        (lambda table: F.embedding(torch.tensor([0, 3, 3]), table, 0), (random(3, 7, 4),)),
        (lambda x: F.layer_norm(x, (4,)), (random(3, 5, 4),)),
        (lambda x: F.batch_norm(x, None, None, training=True), (random(3, 5, 4),)),
        (lambda x: F.cross_entropy(x, torch.tensor([0, 1, 1, 0, 3])), (random(3, 5, 4),)),
        (lambda q: F.scaled_dot_product_attention(q, q, q), (random(3, 2, 5, 4),)),
    ]
    results = []
    for fn, args in calls:
        axes = tuple(0 if isinstance(arg, Tensor) else None for arg in args)
        given = [arg for arg in args if isinstance(arg, Tensor)]
        output = torch.vmap(fn, axes)(*args)
        results += [output, *torch.autograd.grad(output.square().sum(), given)]
    return [result.detach() for result in results]
