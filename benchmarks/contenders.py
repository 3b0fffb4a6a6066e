"""The ways to run N models that are compared, each with tensors of its own.

All of them get the same models and minibatches and return the outputs of all members; the loop
returns a list, the others one stacked tensor. A contender that can't run a scenario raises.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from benchmarks.cases import Scenario
from unisono import Ensemble, per_member

LOOP, VMAP, UNISONO, CAPTURE = "loop", "vmap", "unisono", "unisono capture"
LOOP_COMPILED, VMAP_COMPILED = "loop compiled", "vmap compiled"
TENSORDICT, JAX, HAND = "tensordict", "jax", "hand-written"


class NotApplicableError(Exception):
    """This contender does not exist for this scenario, or isn't installed."""


@dataclass
class Contender:
    """One way to run N models.

    Args:
        run: The timed call. In a training scenario it leaves gradients behind.
        outputs: What ``run`` returned -> (N, *) tensor.
        gradients: Name of a parameter -> (N, *) gradient, or the parameter itself if ``run`` has
            changed it, after a ``run``.
        note: What the table tells, such as the chosen strategy.
        checked_runs: After how many runs outputs and gradients are compared with the loop's.
    """

    run: Callable[[], Any]
    outputs: Callable[[Any], Tensor] = lambda found: found
    gradients: Callable[[], Mapping[str, Tensor]] = dict
    note: str = ""
    checked_runs: int = 1


Maker = Callable[[Scenario, list[nn.Module], list[tuple[Tensor, ...]]], Contender]


def loop(scenario: Scenario, models: Any, minibatches: Any, *, compiled: bool = False) -> Contender:
    """A plain list of the models, each perhaps compiled."""
    models = [copy.deepcopy(model) for model in models]
    callables = [torch.compile(model) for model in models] if compiled else models

    def forward() -> list[Tensor]:
        return [f(*args) for f, args in zip(callables, minibatches, strict=True)]

    parameters = [dict(model.named_parameters()) for model in models]
    leaves = [p for own in parameters for p in own.values()]

    def step() -> list[Tensor]:
        _forget(leaves)
        outputs = forward()
        torch.stack([own.square().mean() for own in outputs]).sum().backward()
        return outputs

    def gradients() -> dict[str, Tensor]:
        return {name: torch.stack([own[name].grad for own in parameters]) for name in parameters[0]}

    if not scenario.backward:
        return Contender(torch.no_grad()(forward), torch.stack)
    return Contender(step, torch.stack, gradients)


def in_float64(models: Any, minibatches: Any) -> tuple[Any, Any]:
    """Copies of models and minibatches in which rounding can't hide or feign a difference."""
    copies = [copy.deepcopy(model).double() for model in models]
    doubled = {
        id(args): tuple(arg.double() if arg.is_floating_point() else arg for arg in args)
        for args in minibatches
    }
    return copies, [doubled[id(args)] for args in minibatches]


def vmap(scenario: Scenario, models: Any, minibatches: Any, *, compiled: bool = False) -> Contender:
    """PyTorch's tutorial: `stack_module_state`, `functional_call` and `torch.vmap`.

    The tutorial moves the template to the meta device, which unties tied weights and makes them
    random memory; here it stays where it is, which costs no time.
    """
    parameters, buffers = stack_module_state([copy.deepcopy(model) for model in models])
    template = copy.deepcopy(models[0])

    def fmodel(p: Any, b: Any, *args: Tensor) -> Any:
        return functional_call(template, (p, b), args)

    args, axis = _stacked(scenario, minibatches)
    mapped = torch.vmap(fmodel, (0, 0, *[axis] * len(args)), randomness="different")
    if compiled:
        mapped = torch.compile(mapped)
    return _stacked_contender(scenario, lambda: mapped(parameters, buffers, *args), parameters)


def tensordict(scenario: Scenario, models: Any, minibatches: Any) -> Contender:
    """The parameters of all models in a tensordict, put into one module under `torch.vmap`."""
    try:
        from tensordict import TensorDict
    except ImportError as error:
        raise NotApplicableError("not installed") from error
    copies = [copy.deepcopy(model) for model in models]
    parameters = TensorDict.from_modules(*copies, as_module=True)
    template = copy.deepcopy(models[0]).to("meta")

    def call(p: Any, *args: Tensor) -> Any:
        with p.to_module(template):
            return template(*args)

    args, axis = _stacked(scenario, minibatches)
    mapped = torch.vmap(call, (0, *[axis] * len(args)), randomness="different")
    found = parameters.flatten_keys(".").items()
    leaves = {str(name): leaf for name, leaf in found if leaf.requires_grad}
    return _stacked_contender(scenario, lambda: mapped(parameters, *args), leaves)


def unisono(scenario: Scenario, models: Any, minibatches: Any) -> Contender:
    """An `Ensemble` as it comes. Its first calls, which choose how to run, are not timed."""
    ensemble = Ensemble(models)
    stacked, axis = _stacked(scenario, minibatches)
    args = [per_member(arg) if axis == 0 else arg for arg in stacked]
    leaves = dict(ensemble.members.named_parameters())
    contender = _stacked_contender(scenario, lambda: ensemble(*args), leaves)
    for _ in range(2):
        contender.run()
    contender.note = _strategy(scenario, ensemble, args)
    return contender


def capture(scenario: Scenario, models: Any, minibatches: Any) -> Contender:
    """What `Ensemble.capture` returns: a program for these very inputs."""
    ensemble = Ensemble(models)
    if scenario.backward:
        raise NotApplicableError("forward only")
    if not hasattr(ensemble, "capture"):
        raise NotApplicableError("this version has no capture")
    stacked, axis = _stacked(scenario, minibatches)
    args = [per_member(arg) if axis == 0 else arg for arg in stacked]
    with torch.no_grad():
        program = ensemble.capture(*args)
    return Contender(torch.no_grad()(lambda: program(*args)))


def hand_written(scenario: Scenario, models: Any, minibatches: Any) -> Contender:
    """One `torch.baddbmm` for each layer of an MLP, ReLU in place: the least there is to do."""
    if scenario.backward or not scenario.case.sizes:
        raise NotApplicableError("forward of an MLP only")
    linears = [[m for m in model if isinstance(m, nn.Linear)] for model in models]
    layers = [
        (
            torch.stack([layer.bias.detach() for layer in own]).unsqueeze(1),
            torch.stack([layer.weight.detach().T for layer in own]).contiguous(),
        )
        for own in zip(*linears, strict=True)
    ]
    *hidden, last = layers
    (x,), axis = _stacked(scenario, minibatches)
    n = len(models)

    def forward() -> Tensor:
        h = x.flatten(1).expand(n, -1, -1) if axis is None else x.flatten(2)
        for bias, weight in hidden:
            h = torch.baddbmm(bias, h, weight).relu_()
        return torch.baddbmm(last[0], h, last[1])

    return Contender(torch.no_grad()(forward))


def _stacked_contender(
    scenario: Scenario, forward: Callable[[], Tensor], leaves: Mapping[str, Tensor]
) -> Contender:
    def step() -> Tensor:
        _forget(leaves.values())
        outputs = forward()
        outputs.flatten(1).square().mean(1).sum().backward()
        return outputs

    def gradients() -> dict[str, Tensor]:
        return {name: leaf.grad for name, leaf in leaves.items()}

    if not scenario.backward:
        return Contender(torch.no_grad()(forward))
    return Contender(step, gradients=gradients)


def _stacked(
    scenario: Scenario, minibatches: Sequence[tuple[Tensor, ...]]
) -> tuple[list[Tensor], int | None]:
    """The inputs, and where they carry the member axis."""
    if scenario.shared:
        return list(minibatches[0]), None
    return [torch.stack(own) for own in zip(*minibatches, strict=True)], 0


def _forget(leaves: Any) -> None:
    for leaf in leaves:
        leaf.grad = None


def _strategy(scenario: Scenario, ensemble: Ensemble, args: Sequence[Tensor]) -> str:
    if not hasattr(ensemble, "explain"):
        return ensemble.strategy
    with torch.set_grad_enabled(scenario.backward):
        return str(ensemble.explain(*args).title)
