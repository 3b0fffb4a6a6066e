"""The slow, obvious truth: every member run by itself."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unisono import Ensemble, per_member
from unisono.engine.tree import leaves, tree_map

STRATEGIES = ("fused", "vmap", "loop")

# float64 uses the defaults of assert_close; these are for tests of the other dtypes themselves.
TOLERANCES = {
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}


def loop_outputs(
    models: Sequence[nn.Module], inputs: Sequence[tuple[Any, dict[str, Any]]]
) -> list[Any]:
    """Call model i with inputs i: a list of N outputs."""
    return [model(*args, **kwargs) for model, (args, kwargs) in zip(models, inputs, strict=True)]


def stack_inputs(inputs: Sequence[tuple[Any, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    """One call from N: tensors stacked and marked as per-member, the rest from the first."""

    def join(columns: Sequence[Any]) -> Any:
        rows = [list(leaves(column)) for column in columns]
        parts = iter(range(len(rows[0])))

        def leaf(first: Any) -> Any:
            k = next(parts)
            if not isinstance(first, Tensor):
                return first
            return per_member(torch.stack([row[k][1] for row in rows]))

        return tree_map(leaf, columns[0])

    return join([args for args, _ in inputs]), join([kwargs for _, kwargs in inputs])


def assert_outputs_equal(actual: Any, expected: Sequence[Any], **tolerance: float) -> None:
    """Output leaf by leaf: ``actual[i] == expected[i]``, with equal types of containers."""
    mine = list(leaves(actual))
    for i, member in enumerate(expected):
        theirs = list(leaves(member))
        assert [path for path, _ in mine] == [path for path, _ in theirs]
        assert type(actual) is type(member)
        for (path, got), (_, want) in zip(mine, theirs, strict=True):
            if isinstance(want, Tensor):
                assert got.shape[0] == len(expected), f"{path} has no member axis: {got.shape}"
                torch.testing.assert_close(
                    got[i], want, msg=lambda m, p=path, i=i: f"member {i} {p}: {m}", **tolerance
                )
            else:
                assert got == want, f"member {i} {path}: {got} is not {want}"


def assert_state_equal(ens: Ensemble, models: Sequence[nn.Module], **tolerance: float) -> None:
    """Parameters and buffers of every member, by name."""
    for i, model in enumerate(models):
        want = dict(model.named_parameters(remove_duplicate=False))
        want |= dict(model.named_buffers(remove_duplicate=False))
        got = dict(ens.members.named_parameters(remove_duplicate=False))
        got |= dict(ens.members.named_buffers(remove_duplicate=False))
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            torch.testing.assert_close(
                got[name][i].detach(),
                tensor.detach(),
                msg=lambda m, n=name, i=i: f"member {i} {n}: {m}",
                **tolerance,
            )


def assert_gradients_equal(ens: Ensemble, models: Sequence[nn.Module], **tolerance: float) -> None:
    """Gradients of every member, by name; None where a member has none."""
    for name, stacked in ens.members.named_parameters():
        for i, model in enumerate(models):
            want = model.get_parameter(name).grad
            if stacked.grad is None:
                # A member's own gradient may be absent or zero; the ensemble's must not hide one.
                assert want is None or not want.any(), f"{name} of member {i} has a gradient"
                continue
            got = stacked.grad[i]
            want = torch.zeros_like(got) if want is None else want
            torch.testing.assert_close(
                got, want, msg=lambda m, n=name, i=i: f"grad of member {i} {n}: {m}", **tolerance
            )


def total(outputs: Any) -> Tensor:
    """A scalar to which every element of every output contributes in its own way."""
    parts = []
    for _, leaf in leaves(outputs):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            real = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
            weight = torch.linspace(0.5, 1.5, real.numel()).to(real).view(real.shape)
            parts.append((real * weight).square().sum())
    return torch.stack(parts).sum()


def copies(models: Sequence[nn.Module]) -> list[nn.Module]:
    """Models to train, so that the ones given stay as they are."""
    return [copy.deepcopy(model) for model in models]


def train_steps(
    step: Callable[[], Tensor], optimizers: Sequence[torch.optim.Optimizer], steps: int = 3
) -> list[Tensor]:
    """The losses of ``steps`` steps."""
    losses = []
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = step()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.detach())
    return losses


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Run ``work(0), ..., work(count - 1)`` at the same time; what they raise is theirs to keep."""
    threads = [threading.Thread(target=work, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
