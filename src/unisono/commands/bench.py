"""``unisono bench``: the Performance section of PyTorch's ensembling tutorial, on this machine.

The statements are the tutorial's own. Like it, they run with gradients enabled, because the
parameters require them. Unlike it, they are timed in turns, so that a slow moment of the machine
hits all of them, with the same number of threads for each (`Timer` alone would take one).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils.benchmark import Timer

from unisono import Ensemble, per_member
from unisono.commands.machine import describe_machine
from unisono.commands.models import SimpleMLP
from unisono.commands.outcome import CommandError

Scene: TypeAlias = dict[str, Any]

LOOP: Final = "without vmap"
VMAP: Final = "with vmap"
UNISONO: Final = "with unisono"

OPTIONS: Final[dict[str, dict[str, str]]] = {
    "different minibatch per model": {
        LOOP: "[model(minibatch) for model, minibatch in zip(models, minibatches)]",
        VMAP: "vmap(fmodel)(params, buffers, minibatches)",
        UNISONO: "ensemble(per_member(minibatches))",
    },
    "same minibatch": {
        LOOP: "[model(minibatch) for model in models]",
        VMAP: "vmap(fmodel, in_dims=(0, 0, None))(params, buffers, minibatch)",
        UNISONO: "ensemble(minibatch)",
    },
}

_SECONDS_PER_TURN: Final = 0.03  # long against the clock, short against the machine's moods
_ATOL, _RTOL = 1e-3, 1e-5  # the tutorial's own tolerances


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Args:
        members: Number of models.
        batch: Images per minibatch.
        hidden: Width of the hidden layers.
        device: Where to run.
        threads: Threads of torch on the CPU, for every contender.
        rounds: How often each contender has its turn.
    """

    members: int
    batch: int
    hidden: int
    device: torch.device
    threads: int
    rounds: int


def run_bench(settings: BenchSettings, on_round: Callable[[], None]) -> dict[str, Any]:
    """Compare the loop, plain `torch.vmap` and unisono on both options of the tutorial.

    Args:
        settings: What to measure.
        on_round: Called after every round of both options.

    Returns:
        The machine, the sizes, and for each option the times and their ratios; plain
        numbers and strings.

    Raises:
        CommandError: If a contender's predictions differ from the loop's; then nothing
            is timed.
    """
    before = torch.get_num_threads()
    # Already for the check: on its first call the ensemble chooses how to run, by the clock.
    torch.set_num_threads(settings.threads)
    try:
        scene = build_scene(settings)
        for statements in OPTIONS.values():
            assert_equal_to_loop(statements, scene)
        options = {
            name: summarise(
                time_in_turns(
                    statements,
                    scene,
                    rounds=settings.rounds,
                    threads=settings.threads,
                    on_round=on_round,
                )
            )
            for name, statements in OPTIONS.items()
        }
    finally:
        torch.set_num_threads(before)
    return {
        "machine": describe_machine(settings.device),
        "members": settings.members,
        "batch": settings.batch,
        "hidden": settings.hidden,
        "threads": settings.threads,
        "rounds": settings.rounds,
        "options": options,
    }


def build_scene(settings: BenchSettings) -> Scene:
    """Make the models, the data and every name that the statements use.

    Args:
        settings: Sizes and device.

    Returns:
        Name -> value, the globals of the timed statements.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        models = [SimpleMLP(hidden=settings.hidden) for _ in range(settings.members)]
        data = torch.randn(settings.members, settings.batch, 1, 28, 28)
    models = [model.to(settings.device) for model in models]
    minibatches = data.to(settings.device)
    params, buffers = stack_module_state([*models])
    template = copy.deepcopy(models[0]).to("meta")

    def fmodel(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
        return functional_call(template, (params, buffers), (x,))

    return {
        "models": models,
        "minibatches": minibatches,
        "minibatch": minibatches[0],
        "vmap": torch.vmap,
        "fmodel": fmodel,
        "params": params,
        "buffers": buffers,
        "ensemble": Ensemble(list[nn.Module](models)),
        "per_member": per_member,
    }


def assert_equal_to_loop(statements: dict[str, str], scene: Scene) -> None:
    """Run each contender once and compare it with the loop.

    Args:
        statements: Contender -> code; the very text that is timed later.
        scene: The globals of the code.

    Raises:
        CommandError: If one differs.
    """
    expected = torch.stack(eval(statements[LOOP], scene))
    for name in (VMAP, UNISONO):
        try:
            got = eval(statements[name], scene)
            torch.testing.assert_close(got, expected, atol=_ATOL, rtol=_RTOL)
        except AssertionError as error:
            reason = " ".join(str(error).split())
            raise CommandError(f"{statements[name]} differs from the loop: {reason}") from error


def time_in_turns(
    statements: dict[str, str],
    scene: Scene,
    *,
    rounds: int,
    threads: int,
    on_round: Callable[[], None],
) -> dict[str, list[float]]:
    """Time every contender once per round: A B C, A B C, ...

    Args:
        statements: Contender -> code.
        scene: The globals of the code.
        rounds: How often each contender has its turn.
        threads: Threads of torch on the CPU, for every contender.
        on_round: Called after every round.

    Returns:
        Contender -> seconds per call, one value per round.
    """
    timers = {
        name: Timer(stmt=code, globals=scene, num_threads=threads)
        for name, code in statements.items()
    }
    repeats = {
        name: max(1, round(_SECONDS_PER_TURN / timer.timeit(5).mean))
        for name, timer in timers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(repeats[name]).mean)
        on_round()
    return seconds


def summarise(seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Reduce the rounds to medians, interquartile ranges and ratios.

    Args:
        seconds: Contender -> seconds per call, one value per round.

    Returns:
        ``seconds``: contender -> ``median`` and ``iqr``. ``ratios``: for each pair the
        quotient of the medians and the median of the quotients within one round; above
        1, the second of the pair is the faster.

    Example:
        >>> report = summarise({"without vmap": [4.0, 6.0], "with unisono": [2.0, 2.0]})
        >>> report["ratios"]["without vmap / with unisono"]["of_medians"]
        2.5
    """
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    names = list(seconds)
    pairs = [(a, b) for a in names for b in names if a != b]
    return {
        "seconds": {
            name: {"median": medians[name], "iqr": _interquartile_range(values)}
            for name, values in seconds.items()
        },
        "ratios": {
            f"{a} / {b}": {
                "of_medians": medians[a] / medians[b],
                "median_of_rounds": float(np.median(np.divide(seconds[a], seconds[b]))),
            }
            for a, b in pairs
        },
    }


def _interquartile_range(values: list[float]) -> float:
    low, high = np.percentile(values, [25, 75])
    return float(high - low)
