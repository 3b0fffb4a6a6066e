"""The ways to train N models that are compared: forward, backward and one step of Adam.

All get the same models and minibatches, start from the same weights, and leave parameters behind
that are compared with the loop's after three steps. The loss is the mean of the squared outputs, as
in `benchmarks.predict`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from benchmarks.cases import Scenario
from benchmarks.contenders import Contender, NotApplicableError
from unisono import Ensemble, optim, per_member

LOOP, VMAP, VMAP_FUSED = "loop", "vmap", "vmap, fused Adam"
UNISONO, OWN_VALUES, JAX = "unisono", "unisono, own values", "jax"
LR = 1e-3
CHECKED_STEPS = 3


def loop(scenario: Scenario, models: Any, minibatches: Any) -> Contender:
    """N models, each with its own `torch.optim.Adam` as it comes."""
    models = [copy.deepcopy(model) for model in models]
    optimizers = [torch.optim.Adam(model.parameters(), lr=LR) for model in models]

    def step() -> list[Tensor]:
        losses = []
        for model, optimizer, args in zip(models, optimizers, minibatches, strict=True):
            optimizer.zero_grad()
            loss = model(*args).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    def parameters() -> dict[str, Tensor]:
        own = [dict(model.named_parameters()) for model in models]
        return {name: torch.stack([p[name].detach() for p in own]) for name in own[0]}

    return Contender(step, torch.stack, parameters, checked_runs=CHECKED_STEPS)


def vmap(
    scenario: Scenario, models: Any, minibatches: Any, *, fused: bool | None = None
) -> Contender:
    """PyTorch's tutorial recipe, and one `torch.optim.Adam` over the stacked parameters."""
    parameters, buffers = stack_module_state([copy.deepcopy(model) for model in models])
    template = copy.deepcopy(models[0])
    optimizer = torch.optim.Adam(parameters.values(), lr=LR, fused=fused)
    args, axis = _stacked(scenario, minibatches)

    def member_loss(p: Any, b: Any, *own: Tensor) -> Tensor:
        return functional_call(template, (p, b), own).square().mean()

    mapped = torch.vmap(member_loss, (0, 0, *[axis] * len(args)), randomness="different")

    def step() -> Tensor:
        optimizer.zero_grad()
        losses = mapped(parameters, buffers, *args)
        losses.sum().backward()
        optimizer.step()
        return losses.detach()

    return Contender(step, gradients=lambda: _detached(parameters), checked_runs=CHECKED_STEPS)


def unisono(
    scenario: Scenario, models: Any, minibatches: Any, *, own_values: bool = False
) -> Contender:
    """An `Ensemble` and `unisono.optim.Adam`, all members alike or every value of its own.

    With ``own_values`` each hyperparameter is given once per member. They differ in the last
    digits only, so that the result can be compared with the loop's.
    """
    ens = Ensemble(models)
    n = len(models)
    if own_values:
        step_apart = 1e-9

        def each(value: float) -> list[float]:
            return [value * (1 + step_apart * i) for i in range(n)]

        betas = list(zip(each(0.9), each(0.999), strict=True))
        optimizer = optim.Adam(ens, each(LR), betas, each(1e-8), [1e-15 * i for i in range(n)])
    else:
        optimizer = optim.Adam(ens, lr=LR)
    stacked, axis = _stacked(scenario, minibatches)
    args = [per_member(arg) if axis == 0 else arg for arg in stacked]

    def step() -> Tensor:
        optimizer.zero_grad()
        losses = ens(*args).flatten(1).square().mean(1)
        losses.sum().backward()
        optimizer.step()
        return losses.detach()

    leaves = dict(ens.members.named_parameters())
    return Contender(step, gradients=lambda: _detached(leaves), checked_runs=CHECKED_STEPS)


def jax(scenario: Scenario, models: Any, minibatches: Any) -> Contender:
    """``jit`` of the gradients under ``vmap`` and `optax.adam`, the buffers given away."""
    if not scenario.case.sizes:
        raise NotApplicableError("written for the MLPs only")
    try:
        import jax
        import optax
    except ImportError as error:
        raise NotApplicableError("not installed") from error
    from benchmarks.jax_mlp import make_forward, to_torch

    forward, weights, x = make_forward(scenario, models, minibatches)
    optimizer = optax.adam(LR)

    def loss(every: Any) -> Any:
        losses = (forward(every, x) ** 2).mean(axis=(1, 2))
        return losses.sum(), losses

    def update(every: Any, state: Any) -> Any:
        (_, losses), gradients = jax.value_and_grad(loss, has_aux=True)(every)
        changes, state = optimizer.update(gradients, state, every)
        return optax.apply_updates(every, changes), state, losses

    compiled = jax.jit(update, donate_argnums=(0, 1))
    now = {"weights": weights, "state": optimizer.init(weights)}

    def step() -> Any:
        now["weights"], now["state"], losses = compiled(now["weights"], now["state"])
        jax.block_until_ready(now["weights"])
        return losses

    def parameters() -> dict[str, Tensor]:
        return {name: to_torch(value) for name, value in now["weights"].items()}

    return Contender(step, to_torch, parameters, checked_runs=CHECKED_STEPS)


Maker = Callable[[Scenario, list[nn.Module], list[tuple[Tensor, ...]]], Contender]


def _stacked(scenario: Scenario, minibatches: Any) -> tuple[list[Tensor], int | None]:
    if scenario.shared:
        return list(minibatches[0]), None
    return [torch.stack(own) for own in zip(*minibatches, strict=True)], 0


def _detached(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in parameters.items()}
