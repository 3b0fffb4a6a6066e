"""A layer in each of N members: what runs it, and a line of a table with its times."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.contenders import LOOP, UNISONO, VMAP, Contender
from benchmarks.measure import TOLERANCE, assert_equal, results, time_in_turns


def table_head(what: str) -> str:
    """The first two lines of the table of which `timed_row` makes the others."""
    columns = f"| {what} | | loop, ms | vmap | unisono | loop / unisono | vmap / unisono |"
    return f"{columns}\n|---|---|---|---|---|---|---|"


def timed_row(
    name: str, backward: bool, ready: Mapping[str, Contender], rounds: int, seconds: float
) -> str:
    """A line of the table: compared with the loop first, then timed in turns."""
    wanted = results(ready[LOOP])
    for contender in ready.values():
        assert_equal(results(contender), wanted, TOLERANCE)
    times = time_in_turns(ready, rounds=rounds, seconds=seconds)
    loop, vmap, ours = (1e3 * times[each].median for each in (LOOP, VMAP, UNISONO))
    what = "training" if backward else "forward"
    ratios = f"{loop / ours:.2f} | {vmap / ours:.2f}"
    return f"| {name} | {what} | {loop:.3g} | {vmap:.3g} | {ours:.3g} | {ratios} |"


def layer_contender(
    forward: Callable[[], list[Tensor]],
    inputs: list[Tensor],
    weights: list[Tensor],
    backward: bool,
) -> Contender:
    """What runs ``forward``, in training with the gradients of inputs and weights, if any."""
    leaves = [*inputs, *weights]

    def step() -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None
        outputs = forward()
        torch.autograd.backward(outputs, [out.detach() for out in outputs])
        return outputs

    def gradients() -> dict[str, Tensor]:
        leaves = {"inputs": inputs, "weights": weights}
        return {name: _whole(own) for name, own in leaves.items() if own}

    def whole(outputs: list[Tensor]) -> Tensor:
        return outputs[0] if len(outputs) == 1 else torch.stack(outputs)

    if not backward:
        return Contender(torch.no_grad()(forward), whole)
    return Contender(step, whole, gradients)


def _whole(leaves: list[Tensor]) -> Tensor:
    """The gradients of all members."""
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return found[0] if len(found) == 1 else torch.stack(found)
