"""Time the loop, torch.vmap and unisono on networks of several kinds, wins and losses alike.

Run from the root of the repository: ``python benchmarks/speed.py [--rounds 30] [--only NAME]``.
Before anything is timed, every contender's outputs (and gradients, where they are timed) are
compared with the loop's. The contenders take turns in every round; a ratio is a quotient of
medians. Prints one row of a Markdown table per case.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from unisono import Ensemble, per_member
from unisono.commands.bench import summarise, time_in_turns
from unisono.commands.machine import describe_machine
from unisono.commands.models import SimpleMLP

LOOP, VMAP, UNISONO = "loop", "vmap", "unisono"


def mlp(*sizes: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(first: int, second: int) -> nn.Module:
    """Two convolutions with batch norm on 28x28 images."""
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(second, 10),
    )


def transformer() -> nn.Module:
    """Two encoder layers of width 64."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@dataclass(frozen=True)
class Case:
    """N models, and the shape of one minibatch.

    Args:
        make: Makes one model.
        members: Number of models.
        shape: Of one minibatch.
        backward: Whether to time forward and backward instead of forward alone.
        shared: Whether all members see one minibatch.
    """

    make: Callable[[], nn.Module]
    members: int
    shape: tuple[int, ...]
    backward: bool = False
    shared: bool = False


CASES = {
    "tutorial MLP, own minibatches": Case(SimpleMLP, 10, (64, 1, 28, 28)),
    "tutorial MLP, one minibatch": Case(SimpleMLP, 10, (64, 1, 28, 28), shared=True),
    "tutorial MLP, training": Case(SimpleMLP, 10, (64, 1, 28, 28), backward=True),
    "100 x 8-32-32-1": Case(lambda: mlp(8, 32, 32, 1), 100, (16, 8)),
    "100 x 8-32-32-1, training": Case(lambda: mlp(8, 32, 32, 1), 100, (16, 8), backward=True),
    "10 critics 23-256-256-1": Case(lambda: mlp(23, 256, 256, 1), 10, (256, 23)),
    "2 critics 23-256-256-1": Case(lambda: mlp(23, 256, 256, 1), 2, (256, 23)),
    "4 x 1024-1024-1024-1024": Case(lambda: mlp(1024, 1024, 1024, 1024), 4, (64, 1024)),
    "8 x Transformer d 64, batch 8": Case(lambda: transformer().eval(), 8, (8, 16, 64)),
    "8 x Transformer d 64, batch 64": Case(lambda: transformer().eval(), 8, (64, 16, 64)),
    "8 x Transformer d 64, batch 8, training": Case(transformer, 8, (8, 16, 64), backward=True),
    "8 x CNN 8-16": Case(lambda: cnn(8, 16).eval(), 8, (16, 1, 28, 28)),
    "8 x CNN 32-64": Case(lambda: cnn(32, 64).eval(), 8, (32, 1, 28, 28)),
    "8 x CNN 8-16, training": Case(lambda: cnn(8, 16), 8, (16, 1, 28, 28), backward=True),
    "8 x CNN 32-64, training": Case(lambda: cnn(32, 64), 8, (32, 1, 28, 28), backward=True),
}


def contenders(case: Case) -> dict[str, Callable[[], Tensor]]:
    """Forward (and backward) for all members, three ways, each with tensors of its own."""
    models = [case.make() for _ in range(case.members)]
    xs = torch.randn(case.members, *case.shape)
    looped = [copy.deepcopy(model) for model in models]
    parameters, buffers = stack_module_state([copy.deepcopy(model) for model in models])
    template = copy.deepcopy(models[0]).to("meta")
    ensemble = Ensemble(models)

    def one(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(template, (p, b), (x,))

    mapped = torch.vmap(one, (0, 0, None if case.shared else 0), randomness="different")
    inputs = xs[0] if case.shared else xs
    marked = xs[0] if case.shared else per_member(xs)
    each = [xs[0]] * case.members if case.shared else list(xs)
    leaves = {
        LOOP: [p for model in looped for p in model.parameters()],
        VMAP: list(parameters.values()),
        UNISONO: list(ensemble.parameters()),
    }
    forwards: dict[str, Callable[[], Tensor]] = {
        LOOP: lambda: torch.stack([m(x) for m, x in zip(looped, each, strict=True)]),
        VMAP: lambda: mapped(parameters, buffers, inputs),
        UNISONO: lambda: ensemble(marked),
    }
    if not case.backward:
        return {name: torch.no_grad()(forward) for name, forward in forwards.items()}

    def with_backward(name: str) -> Callable[[], Tensor]:
        def step() -> Tensor:
            for leaf in leaves[name]:
                leaf.grad = None
            outputs = forwards[name]()
            outputs.square().sum().backward()
            return outputs

        return step

    steps = {name: with_backward(name) for name in forwards}
    gradients = {}
    for name, step in steps.items():
        step()
        gradients[name] = [leaf.grad for leaf in leaves[name]]
    per_model = len(leaves[UNISONO])
    loop = [torch.stack(gradients[LOOP][k::per_model]) for k in range(per_model)]
    for name in (VMAP, UNISONO):
        for got, want in zip(gradients[name], loop, strict=True):
            torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-3)
    return steps


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", default="", help="part of the names of the cases to run")
    arguments = parser.parse_args()
    threads = torch.get_num_threads()
    machine = describe_machine(torch.device("cpu"))
    print(f"{machine['cpu']}, {threads} threads, torch {machine['torch']},", end=" ")
    print(f"medians of {arguments.rounds} interleaved rounds; ms per call\n")
    print("| case | loop | vmap | unisono | loop / unisono | vmap / unisono |")
    print("|---|---|---|---|---|---|")
    for name, case in CASES.items():
        if arguments.only not in name:
            continue
        torch.manual_seed(0)
        runs = contenders(case)
        expected = runs[LOOP]()
        for other in (VMAP, UNISONO):
            torch.testing.assert_close(runs[other](), expected, atol=1e-3, rtol=1e-3)
        statements = {key: f"runs[{key!r}]()" for key in runs}
        seconds = time_in_turns(
            statements,
            {"runs": runs},
            rounds=arguments.rounds,
            threads=threads,
            on_round=lambda: None,
        )
        median = {
            key: value["median"] * 1e3 for key, value in summarise(seconds)["seconds"].items()
        }
        row = [f"{median[key]:.2f}" for key in (LOOP, VMAP, UNISONO)]
        row += [f"{median[key] / median[UNISONO]:.2f}" for key in (LOOP, VMAP)]
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
