"""The MLPs in JAX: ``jit(vmap(...))`` over stacked weights, on JAX's own threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import Scenario
from benchmarks.contenders import Contender, NotApplicableError


def jax_mlp(scenario: Scenario, models: Any, minibatches: Any) -> Contender:
    """Forward, or the gradients of the same loss.

    Raises:
        NotApplicableError: If JAX isn't installed or the network isn't an MLP.
    """
    if not scenario.case.sizes:
        raise NotApplicableError("written for the MLPs only")
    try:
        import jax
    except ImportError as error:
        raise NotApplicableError("not installed") from error
    mapped, weights, x = make_forward(scenario, models, minibatches)
    if not scenario.backward:
        call = jax.jit(mapped)
        return Contender(lambda: call(weights, x).block_until_ready(), to_torch)

    def loss(every: Mapping[str, Any]) -> Any:
        outputs = mapped(every, x)
        return (outputs**2).mean(axis=(1, 2)).sum(), outputs

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    last: dict[str, Any] = {}

    def run() -> Any:
        (_, outputs), last["gradients"] = jax.block_until_ready(step(weights))
        return outputs

    def gradients() -> dict[str, Tensor]:
        return {name: to_torch(g) for name, g in last["gradients"].items()}

    return Contender(run, to_torch, gradients)


def make_forward(
    scenario: Scenario, models: Any, minibatches: Any
) -> tuple[Callable[..., Any], dict[str, Any], Any]:
    """The forward of all members, their stacked weights, and the inputs."""
    import jax

    # Computes in float32 whatever it is given, unless it is told; only a check asks for more.
    jax.config.update("jax_enable_x64", next(models[0].parameters()).dtype == torch.float64)
    names = [name for name, m in models[0].named_modules() if isinstance(m, nn.Linear)]
    weights = {
        f"{name}.{kind}": _stack(models, name, kind)
        for name in names
        for kind in ("weight", "bias")
    }
    axis = None if scenario.shared else 0
    rows = [args[0].flatten(1).numpy() for args in minibatches]
    x = jax.numpy.asarray(rows[0] if scenario.shared else np.stack(rows))

    def forward(own: Mapping[str, Any], h: Any) -> Any:
        for name in names:
            h = h @ own[f"{name}.weight"].T + own[f"{name}.bias"]
            h = jax.nn.relu(h) if name != names[-1] else h
        return h

    return jax.vmap(forward, (0, axis)), weights, x


def _stack(models: list[nn.Module], name: str, kind: str) -> Any:
    import jax

    tensors = [getattr(model.get_submodule(name), kind).detach().numpy() for model in models]
    return jax.numpy.asarray(np.stack(tensors))


def to_torch(array: Any) -> Tensor:
    """A copy of the array."""
    return torch.from_numpy(np.array(array))
