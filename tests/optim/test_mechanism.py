"""How a step runs: which kernels, how many, in which memory, on which device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from solo_training import (
    CNN,
    KINDS,
    Kind,
    N,
    assert_trained_alike,
    make_data,
    make_models,
    mlp,
    pair,
    train_ensemble,
    train_solo,
)
from test_placement import CUDA, fake, move
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from unisono import Ensemble, optim
from unisono.engine.planning.storage import adopt, current_format, is_free
from unisono.optim import elementwise, fused, paths, state

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
both = pytest.mark.parametrize("which", ["equal", "each"])
ways = pytest.mark.parametrize("large", [0, 10**9], ids=["kernel", "passes"])
KERNELS = {"SGD": "_fused_sgd_", "Adam": "_fused_adam_", "AdamW": "_fused_adamw_"}


class Count(TorchDispatchMode):
    """Counts the operations of torch by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def ops_of_a_step(optimizer: torch.optim.Optimizer, **step: Any) -> Counter[str]:
    with Count() as count:
        optimizer.step(**step)
    return count.ops


def with_gradients(ens: Ensemble) -> Ensemble:
    for p in ens.parameters():
        p.grad = torch.randn_like(p)
    return ens


@pytest.mark.parametrize("name", KERNELS)
def test_equal_members_in_step_run_in_one_kernel(name: str) -> None:
    kind = KINDS[name]
    for values in (kind.equal, {k: [v] * N for k, v in kind.equal.items()}):
        optimizer = kind.ours(with_gradients(Ensemble(make_models("mlp"))), **values)
        for _ in range(2):
            assert ops_of_a_step(optimizer)[KERNELS[name]] == 1
        assert ops_of_a_step(optimizer, active=[True, False, True])[KERNELS[name]] == 1
    # From now on they are out of step, which makes a difference to Adam only.
    assert ops_of_a_step(optimizer)[KERNELS[name]] == (1 if name == "SGD" else 0)


def test_large_members_with_values_of_their_own_run_in_one_kernel_each() -> None:
    def make() -> nn.Module:
        return nn.Linear(paths.LARGE_MEMBER, 1)

    ens = with_gradients(Ensemble([make() for _ in range(N)]))
    values = {k: v for k, v in KINDS["Adam"].each.items() if k != "decoupled_weight_decay"}
    optimizer = optim.Adam(ens, **values)
    assert ops_of_a_step(optimizer)["_fused_adam_"] == N
    assert ops_of_a_step(optimizer, active=[False, True, True])["_fused_adam_"] == 2


@kinds
@pytest.mark.parametrize("is_partial", [True, False])
def test_the_number_of_operations_does_not_depend_on_the_number_of_members(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, is_partial: bool
) -> None:
    monkeypatch.setattr(elementwise, "BLOCK", 10**9)

    def count(times: int) -> Counter[str]:
        ens = with_gradients(Ensemble([mlp() for _ in range(times * N)]))
        optimizer = kind.ours(ens, **{k: v * times for k, v in kind.each.items()})
        optimizer.step()
        mask = {"active": [True, False, True] * times} if is_partial else {}
        return ops_of_a_step(optimizer, **mask)

    few, many = count(1), count(20)
    assert not any(name.startswith("_fused") for name in few)
    assert few == many


def test_the_passes_are_few() -> None:
    ens = with_gradients(Ensemble([mlp() for _ in range(N)]))
    optimizer = optim.Adam(ens, lr=[0.1, 0.2, 0.3])
    optimizer.step()
    ops = ops_of_a_step(optimizer)
    arithmetic = {"lerp_", "mul", "sqrt", "add_", "div_", "addcdiv_"}
    assert sum(ops[name] for name in arithmetic) == 7 * 4
    assert ops["_foreach_add_"] == 1  # the steps of all parameters are counted at once


@kinds
@both
@ways
@pytest.mark.parametrize("memory_format", ["transposed", "channels_last"])
def test_parameters_in_another_order_in_memory(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, which: str, large: int, memory_format: Any
) -> None:
    monkeypatch.setattr(paths, "LARGE_MEMBER", large)
    name = "mlp" if memory_format == "transposed" else "cnn"
    ens, ours, solo, theirs = pair(kind, which, make_models(name))
    data = make_data(name, 4)
    train_ensemble(ens, ours, data[:1])  # state in the order from before
    train_solo(solo, theirs, data[:1])
    ours.zero_grad()
    template = ens._planner.pool.take()
    adopt(template, memory_format)
    assert current_format(template) == memory_format
    train_ensemble(ens, ours, data[1:3])
    train_ensemble(ens, ours, data[3:], active=[True, False, True])
    train_solo(solo, theirs, data[1:3])
    solo[1](data[3][1])  # its batch norm sees the data all the same
    for i in (0, 2):
        train_solo(solo[i : i + 1], theirs[i : i + 1], [data[3][i : i + 1]])
    assert_trained_alike(ens, ours, solo, theirs)
    for p in ens.parameters():
        for key, value in ours.state[p].items():
            if key != "step" and 1 not in p.shape:
                assert value.stride() == p.stride()


@both
@pytest.mark.parametrize("memory_format", ["transposed", "channels_last"])
def test_kernels_get_everything_contiguous_and_in_one_order(
    monkeypatch: pytest.MonkeyPatch, which: str, memory_format: Any
) -> None:
    # They copy what isn't contiguous, and on some devices read by address without a look.
    monkeypatch.setattr(paths, "LARGE_MEMBER", 0)
    kernel, calls = torch._fused_adam_, []

    def spy(parameters: Any, *rest: Any, **values: Any) -> None:
        read = [tensors for tensors in rest[:4] if tensors]  # without AMSGrad the fourth is empty
        for like, *others in zip(parameters, *read, strict=True):
            calls.append(all(t.is_contiguous() and t.shape == like.shape for t in (like, *others)))
        kernel(parameters, *rest, **values)

    monkeypatch.setattr(torch, "_fused_adam_", spy)
    ens = Ensemble(make_models("mlp" if memory_format == "transposed" else "cnn"))
    adopt(ens._planner.pool.take(), memory_format)
    assert not all(p.is_contiguous() for p in ens.parameters())
    values = {k: v for k, v in KINDS["Adam"].values(which).items() if k[0] != "d"}
    optimizer = optim.Adam(ens, **values)
    for p in ens.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype)  # in another order than its parameter
        assert p.grad.is_contiguous()
    optimizer.step()
    assert calls
    assert all(calls)


@kinds
@both
@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, which: str, large: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(paths, "LARGE_MEMBER", large)
    ens, ours, _, _ = pair(kind, which, make_models("mlp"))
    ens.to(dtype)
    for p in ens.parameters():
        p.grad = torch.randn(p.shape).to(dtype)
    # The truth starts from the same rounded numbers, and is computed in float64.
    exact = [model.double() for model in ens.unstack()]
    theirs = [kind.torchs(m.parameters(), **kind.solo(which, i)) for i, m in enumerate(exact)]
    for optimizer in (ours, *theirs):
        for _ in range(3):
            optimizer.step()
    eps = 8 * torch.finfo(dtype).eps
    for name, p in ens.members.named_parameters():
        assert p.dtype == dtype
        want = torch.stack([m.get_parameter(name) for m in exact])
        torch.testing.assert_close(p.double(), want, rtol=eps, atol=eps)


class ComplexScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, dtype=torch.complex128))


@kinds
@both
def test_complex_parameters(kind: Kind, which: str) -> None:
    models = [ComplexScale() for _ in range(N)]
    ens, ours, solo, theirs = pair(kind, which, models)
    for _ in range(3):
        gradient = torch.randn(N, 3, dtype=torch.complex128)
        ens.members.scale.grad = gradient.conj()  # a lazy conjugate
        for i, model in enumerate(solo):
            model.scale.grad = gradient[i].conj().resolve_conj()
        for optimizer in (ours, *theirs):
            optimizer.step()
    assert_trained_alike(ens, ours, solo, theirs)


@kinds
@both
@ways
def test_parameters_that_moved_are_found(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, which: str, large: int
) -> None:
    monkeypatch.setattr(paths, "LARGE_MEMBER", large)
    ens, ours, solo, theirs = pair(kind, which, make_models("mlp"))
    data = make_data("mlp", 6)
    train_ensemble(ens, ours, data[:2])
    for p in ens.parameters():
        p.data = p.data.clone()
    train_ensemble(ens, ours, data[2:4])
    ours.zero_grad()
    ens.to(torch.float32).to(torch.float64)
    train_solo(solo, theirs, data[:4])
    for model in solo:
        model.to(torch.float32).to(torch.float64)
    train_ensemble(ens, ours, data[4:])
    train_solo(solo, theirs, data[4:])
    assert_trained_alike(ens, ours, solo, theirs)


def test_the_state_follows_the_dtype_of_its_parameter() -> None:
    ens = Ensemble(make_models("mlp"))
    optimizer = optim.Adam(ens, lr=[0.1, 0.2, 0.3])
    train_ensemble(ens, optimizer, make_data("mlp", 2))
    optimizer.zero_grad()
    ens.float()
    train_ensemble(ens, optimizer, make_data("mlp", 1, dtype=torch.float32))
    for kept in optimizer.state.values():
        assert {kept["exp_avg"].dtype, kept["exp_avg_sq"].dtype} == {torch.float32}
        assert kept["step"].tolist() == [3, 3, 3]


def test_the_order_in_memory_is_still_free_before_the_first_step() -> None:
    ens = Ensemble([CNN() for _ in range(N)])
    optimizer = optim.SGD(ens, lr=0.1, momentum=0.9)
    template = ens._planner.pool.take()
    assert is_free(template, "channels_last")
    ens(torch.randn(2, 2, 6, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    template = ens._planner.pool.take()
    other = "contiguous" if current_format(template) == "channels_last" else "channels_last"
    assert other == "contiguous" or not is_free(template, other)


@contextmanager
def on_a_fake_gpu(monkeypatch: pytest.MonkeyPatch, ens: Ensemble) -> Iterator[None]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    move(mode, ens)
    for p in ens.members.parameters():
        p.grad = fake(mode, p)
    # The steps are real numbers on the host; a fake mode gives them no values.
    done = np.array([3.0, 1.0, 2.0])
    monkeypatch.setattr(state, "steps_done", lambda kept: done[: kept["step"].numel()])
    with mode:
        yield


# torch has fakes for the kernels of Adam and AdamW only.
ON_A_GPU = [(name, "passes") for name in KINDS] + [("Adam", "kernels"), ("AdamW", "kernels")]


@pytest.mark.parametrize(("name", "way"), ON_A_GPU)
@both
@pytest.mark.parametrize("active", [None, [True, False, True]])
def test_a_step_stays_on_the_device_and_never_waits(
    monkeypatch: pytest.MonkeyPatch, name: str, which: str, way: str, active: Any
) -> None:
    kind = KINDS[name]
    if way == "kernels":
        monkeypatch.setattr(fused, "has_kernel", lambda parameters: True)
        monkeypatch.setattr(paths, "LARGE_MEMBER", 0)
    ens = Ensemble([mlp() for _ in range(N)])
    with on_a_fake_gpu(monkeypatch, ens):
        optimizer = kind.ours(ens, **kind.values(which))
        for _ in range(2):
            optimizer.step(active=active)
        for p in ens.members.parameters():
            assert p.device == CUDA
            for key, value in optimizer.state[p].items():
                assert value.device.type == ("cpu" if key == "step" else "cuda")


@pytest.mark.parametrize("values", [0.1, [0.1, 0.2, 0.3]], ids=["equal", "own"])
@pytest.mark.parametrize("memory_format", ["transposed", "channels_last"])
def test_the_kernels_copy_nothing_that_lies_in_another_order(
    monkeypatch: pytest.MonkeyPatch, values: Any, memory_format: Any
) -> None:
    monkeypatch.setattr(paths, "LARGE_MEMBER", 0)
    name = "mlp" if memory_format == "transposed" else "cnn"
    ens = Ensemble(make_models(name))
    adopt(ens._planner.pool.take(), memory_format)
    for p in ens.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = optim.Adam(ens, lr=values)
    optimizer.step()
    with torch.profiler.profile() as profiler:
        optimizer.step()
    names = {event.key for event in profiler.key_averages()}
    assert "aten::_fused_adam_" in names
    assert not names & {"aten::clone", "aten::contiguous"}
