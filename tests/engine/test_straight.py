"""A member that is one chain of torch's layers runs without template and member axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from unisono import Ensemble, per_member
from unisono.engine import call

XS = torch.randn(3, 5, 4, dtype=torch.float64)


def layers() -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 2)]


def ensemble(make: Callable[[], list[nn.Module]] = layers, **options: Any) -> Ensemble:
    return Ensemble(
        [nn.Sequential(*make()).double() for _ in range(3)], strategy="fused", **options
    )


@pytest.fixture
def by_forward(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each call that runs the member's forward."""
    taken: list[Any] = []
    at_once = call.at_once
    monkeypatch.setattr(call, "at_once", lambda *args: taken.append(args) or at_once(*args))
    return taken


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("grad", [True, False])
def test_it_is_taken(by_forward: list[Any], grad: bool, chunk_size: int | None) -> None:
    ens = ensemble(chunk_size=chunk_size)
    with torch.set_grad_enabled(grad):
        for outputs, given in ((ens(per_member(XS)), XS), (ens(XS[0]), XS[:1].expand(3, -1, -1))):
            expected = torch.stack([member(x) for member, x in zip(ens, given, strict=True)])
            torch.testing.assert_close(outputs, expected)
            assert outputs.requires_grad == grad
    assert not by_forward


def test_three_steps_of_training_equal_the_loop(by_forward: list[Any]) -> None:
    models = [nn.Sequential(*layers()).double() for _ in range(3)]
    ens = Ensemble(models, strategy="fused")
    optimizers = [
        torch.optim.SGD(p, lr=0.1)
        for p in (ens.parameters(), [p for model in models for p in model.parameters()])
    ]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        ens(per_member(XS)).square().sum().backward()
        torch.stack([m(x) for m, x in zip(models, XS, strict=True)]).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    oracles.assert_state_equal(ens, models)
    assert not by_forward


class Own(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return func(*args, **(kwargs or {}))


def test_a_subclass_runs_its_own_forward(by_forward: list[Any]) -> None:
    Ensemble([Own(*layers()).double() for _ in range(3)], strategy="fused")(XS[0])
    assert len(by_forward) == 1


@pytest.mark.parametrize("mode", [Functions, Dispatch])
def test_whoever_listens_hears_everything(by_forward: list[Any], mode: Callable[[], Any]) -> None:
    ens = ensemble()
    expected = ens(XS[0])
    with mode():
        torch.testing.assert_close(ens(XS[0]), expected)
    assert len(by_forward) == 1


def test_hooks_are_run(by_forward: list[Any]) -> None:
    models = [nn.Sequential(*layers()).double() for _ in range(3)]
    for model in models:
        model.register_forward_hook(doubled)
    ens = Ensemble(models, strategy="fused")
    torch.testing.assert_close(ens(XS[0])[1], models[1](XS[0]))
    assert len(by_forward) == 1
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(type(module).__name__)
    )
    try:
        ensemble()(XS[0])
    finally:
        handle.remove()
    assert "LayerNorm" in called


def doubled(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return 2 * output


def test_a_function_of_a_member_runs_as_it_is_written(by_forward: list[Any]) -> None:
    ens = ensemble()
    torch.testing.assert_close(ens.run(lambda member, x: member(x), XS[0]), ens(XS[0]))
    assert len(by_forward) == 1


def test_dropout_that_drops_draws_as_always(by_forward: list[Any]) -> None:
    ens = ensemble(lambda: [nn.Linear(4, 50), nn.Dropout(0.5)])
    first, second, _ = ens(XS[0]) == 0
    assert first.any()
    assert not torch.equal(first, second)
    assert len(by_forward) == 1
    ens.eval()(XS[0])
    assert len(by_forward) == 1


def test_batch_statistics_are_kept(by_forward: list[Any]) -> None:
    models = [nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double() for _ in range(3)]
    ens = Ensemble(models, strategy="fused")
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(ens(x), torch.stack([model(x) for model in models]))
    oracles.assert_state_equal(ens, models)
    assert len(by_forward) == 1


def test_what_is_the_same_for_all_members_can_be_written_to() -> None:
    outputs = ensemble(lambda: [nn.Flatten()])(XS[0])
    outputs[0] = 0
    torch.testing.assert_close(outputs[1], XS[0])


def test_inside_transforms_of_the_user() -> None:
    ens = ensemble(lambda: [nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 2)])
    each = torch.func.vmap(ens, out_dims=1)(XS[0])
    torch.testing.assert_close(each, ens(XS[0]))
    jacobian = torch.func.jacrev(ens)(XS[0, :1])
    torch.testing.assert_close(jacobian[1], torch.func.jacrev(ens[1])(XS[0, :1]))


def test_a_wrong_shape_is_told_as_by_the_layer() -> None:
    ens = ensemble(lambda: [nn.Linear(4, 6), nn.ReLU(), nn.Linear(5, 2)])
    with pytest.raises(RuntimeError, match="Expected size") as info:
        ens(XS[0])
    assert "raised in `2` (Linear)" in info.value.__notes__[0]
    assert ens.members[0].weight.shape == (3, 6, 4)  # type: ignore[index, union-attr]
