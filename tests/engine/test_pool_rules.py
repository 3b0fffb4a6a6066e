"""Pools of images whose channels lie apart: all windows at once, an axis after the other."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import cases
import oracles
from unisono import Ensemble, per_member
from unisono.engine.rules import windows
from unisono.engine.rules.avg_pool import avg_pool
from unisono.engine.rules.max_pool import max_pool

MAX = importlib.import_module("unisono.engine.rules.max_pool")  # there are functions
AVG = importlib.import_module("unisono.engine.rules.avg_pool")  # of these names
N = 3
SHAPES = {1: ((3, 9), (2, 3, 8)), 2: ((3, 9, 8), (2, 3, 7, 10)), 3: ((2, 3, 5, 6, 7),)}
KERNELS: dict[int, tuple[Any, ...]] = {
    1: (1, 2, 3, 5),
    2: (1, 2, 3, (5, 4), (1, 2)),
    3: (1, 2, 3, (1, 2, 3)),
}
DISPATCHED = {"aten::max_pool2d", "aten::adaptive_avg_pool2d"}


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pool is so small, or of such windows, that it is left to torch."""
    monkeypatch.setattr(windows, "_TINY", 1)
    monkeypatch.setattr(MAX, "_FEW", 1)
    monkeypatch.setattr(MAX, "_FEW_WITH_GRADIENTS", 1)
    monkeypatch.setattr(MAX, "_PIECE", 1)
    monkeypatch.setattr(AVG, "_FEW", (1, 1))
    monkeypatch.setattr(AVG, "_LARGE", (99, 99))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def outcome(run: Callable[..., Tensor], *args: Any) -> Tensor | str:
    """The result, or what is wrong."""
    try:
        return run(*args)
    except (RuntimeError, IndexError) as error:
        return str(error)


def own_ops(run: Callable[[], Any]) -> set[str]:
    """Names of the pools that torch runs, and of our functions.

    What the dispatcher passes on to the rules has a name of its own, and is no pool.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    names = {event.name for event in profiler.events()} - DISPATCHED
    return {name for name in names if "pool" in name.lower()}


def options(dims: int) -> Iterator[tuple[Any, ...]]:
    return itertools.product(KERNELS[dims], (None, 1, 2, 3), (0, 1, 2))


def agree(found: Tensor | str, wanted: Tensor | str, *, exactly: bool) -> bool:
    """Whether both are results, which then are equal; else both say the same."""
    if isinstance(wanted, str) or isinstance(found, str):
        assert found == wanted
        return False
    tolerance = {"rtol": 0, "atol": 0} if exactly else {}
    torch.testing.assert_close(found, wanted, equal_nan=True, **tolerance)
    return True


# The pools themselves -----------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.usefixtures("any_size")
def test_max_pool_is_torchs_to_the_bit_with_ties_and_nans(dims: int) -> None:
    pool = getattr(F, f"max_pool{dims}d")
    some = 0
    for shape, own, dilation, ceil in itertools.product(
        SHAPES[dims], options(dims), (1, 2), (False, True)
    ):
        x = drawn(*shape).mul(2).round()
        x.flatten()[::37], x.flatten()[1::11] = torch.nan, -torch.inf
        args = (*own, dilation, ceil)
        wanted = outcome(pool, x, *args)
        if not agree(outcome(max_pool, dims, x, *args), wanted, exactly=True):
            continue
        given, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, wanted = max_pool(dims, given, *args), pool(theirs, *args)
        assert agree(found, wanted, exactly=True)
        weights = drawn(*wanted.shape)
        found.backward(weights)
        wanted.backward(weights)
        assert torch.equal(given.grad, theirs.grad)
        some += 1
    assert some > 60


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.usefixtures("any_size")
def test_avg_pool_is_torchs(dims: int) -> None:
    pool = getattr(F, f"avg_pool{dims}d")
    divisors = ((), (3,), (0,)) if dims > 1 else ((),)
    some = 0
    for shape, own, ceil, counts, divisor in itertools.product(
        SHAPES[dims], options(dims), (False, True), (False, True), divisors
    ):
        x, args = drawn(*shape), (*own, ceil, counts, *divisor)
        wanted = outcome(pool, x, *args)
        if not agree(outcome(avg_pool, dims, x, *args), wanted, exactly=False):
            continue
        given, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        found, wanted = avg_pool(dims, given, *args), pool(theirs, *args)
        assert agree(found, wanted, exactly=False)
        weights = drawn(*wanted.shape)
        found.backward(weights)
        wanted.backward(weights)
        torch.testing.assert_close(given.grad, theirs.grad)
        some += 1
    assert some > 60


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.usefixtures("any_size")
def test_pools_can_be_differentiated_twice(dims: int) -> None:
    x = drawn(*SHAPES[dims][1]).requires_grad_()
    for pool in (max_pool, avg_pool):
        assert torch.autograd.gradcheck(lambda x, pool=pool: pool(dims, x, 3, 2, 1), x)
        assert torch.autograd.gradgradcheck(lambda x, pool=pool: pool(dims, x, 3, 2, 1), x)


@pytest.mark.usefixtures("any_size")
def test_wrong_options_and_inputs_are_torchs_to_refuse() -> None:
    x = drawn(2, 3, 6, 6)
    for args in ((0,), ((2, 2, 2),), (2, -1), (2, 2, 2), (9,), (2, 2, 0, 0), (2, (1, 1, 1))):
        wanted = outcome(F.max_pool2d, x, *args)
        assert isinstance(wanted, str)
        assert outcome(max_pool, 2, x, *args) == wanted
    for shape in ((6,), (1, 2, 3, 6, 6), (0, 3, 6, 6), (2, 3, 0, 6)):
        for pool, ours in ((F.max_pool2d, max_pool), (F.avg_pool2d, avg_pool)):
            empty = drawn(*shape)
            wanted = outcome(pool, empty, 2)
            agree(outcome(ours, 2, empty, 2), wanted, exactly=True)


def test_wrong_sizes_of_an_adaptive_pool_are_refused_as_by_a_member() -> None:
    model = nn.AdaptiveAvgPool2d(2)
    ens = Ensemble([model, copy.deepcopy(model)], strategy="fused")
    for x in (drawn(6), drawn(6, 6)):  # members are no channels
        for given, plain in ((x, x), (per_member(torch.stack([x, x])), x)):
            assert isinstance(outcome(model, plain), str)
            assert isinstance(outcome(ens, given), str)
    x = drawn(2, 3, 7, 6)  # 7 is no multiple of 2
    torch.testing.assert_close(ens(x)[1], model(x))


@pytest.mark.usefixtures("any_size")
def test_halves_and_integers() -> None:
    whole = torch.arange(2 * 3 * 6 * 6).reshape(2, 3, 6, 6)
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        x = whole.to(dtype)
        assert torch.equal(max_pool(2, x, 3, 2, 1), F.max_pool2d(x, 3, 2, 1))
    assert torch.equal(avg_pool(2, whole.half(), 3, 2, 1), F.avg_pool2d(whole.half(), 3, 2, 1))


@pytest.mark.usefixtures("any_size")
def test_a_result_may_be_overwritten() -> None:
    for shape, kernel in itertools.product(((3, 6, 6), (2, 3, 6, 6)), (1, 2)):
        for pool in (max_pool, avg_pool):
            x = drawn(*shape)
            before = x.clone()
            pool(2, x, kernel).zero_()
            assert torch.equal(x, before)
            given = x.clone().requires_grad_()
            pool(2, given, kernel).mul_(2).sum().backward()
            assert given.grad is not None
            assert given.grad.sum() > 0


# In an ensemble -----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.largest, self.mean = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.mean(F.max_pool2d(self.largest(self.conv(x)), 2)), 2)


def build(strategy: Any = "fused") -> tuple[Ensemble, list[nn.Module]]:
    torch.manual_seed(0)
    models: list[nn.Module] = [Net().double() for _ in range(N)]
    return Ensemble(models, strategy=strategy), models


def check_training(ens: Ensemble, models: list[nn.Module], x: Tensor) -> None:
    """Outputs and gradients, of the input too, are those of the loop."""
    given, own = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = ens(per_member(given))
    wanted = torch.stack([model(each) for model, each in zip(models, own, strict=True)])
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(given.grad, own.grad)
    for name, parameter in ens.members.named_parameters():
        gradients = [model.get_parameter(name).grad for model in models]
        torch.testing.assert_close(parameter.grad, torch.stack(gradients))  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", ["fused", "loop", "vmap"])
@pytest.mark.usefixtures("any_size")
def test_an_ensemble_equals_the_loop(strategy: str) -> None:
    ens, models = build(strategy)
    x = drawn(N, 2, 2, 17, 16)
    with torch.no_grad():
        wanted = torch.stack([model(each) for model, each in zip(models, x, strict=True)])
        torch.testing.assert_close(ens(per_member(x)), wanted)
        torch.testing.assert_close(ens(x[0]), torch.stack([model(x[0]) for model in models]))
    check_training(ens, models, x)


@pytest.mark.usefixtures("any_size")
def test_every_pool_of_every_number_of_dimensions() -> None:
    case = next(case.values[0] for case in cases.CASES if case.id == "pooling")
    models = [case.make().double() for _ in range(N)]
    ens = Ensemble(models, strategy="fused")
    rows = [case.inputs() for _ in range(N)]
    args, _ = oracles.stack_inputs(rows)
    with torch.no_grad():
        oracles.assert_outputs_equal(ens(*args), oracles.loop_outputs(models, rows))
    oracles.assert_outputs_equal(ens(*args), oracles.loop_outputs(models, rows))


@pytest.mark.usefixtures("any_size")
def test_torchs_kernels_are_not_what_runs() -> None:
    ens, _ = build()
    x = drawn(2, 2, 17, 16)
    with torch.no_grad():
        ens(x)
        assert own_ops(lambda: ens(x)) == set()
    ens(x)
    assert (
        {"_MaxPool", "_AvgPool"}
        <= own_ops(lambda: ens(x))
        <= {*("_MaxPool", "_AvgPool", "aten::max_pool2d_with_indices")}
    )


@pytest.mark.usefixtures("any_size")
def test_a_layer_of_a_member_alone_takes_the_same_way() -> None:
    ens, models = build("loop")
    x = drawn(2, 2, 17, 16)
    with torch.no_grad():
        ens(x)
        ran = own_ops(lambda: ens(x))
        assert "aten::avg_pool2d" not in ran
        largest = Ensemble([nn.MaxPool2d(2) for _ in models], strategy="loop")
        assert own_ops(lambda: largest(x)) == set()
        assert torch.equal(largest(x)[0], F.max_pool2d(x, 2))


@pytest.mark.usefixtures("any_size")
def test_captures_hold_the_same_ops() -> None:
    ens, models = build()
    x = drawn(2, 2, 17, 16)
    ens.eval()
    with torch.no_grad():
        program = ens.capture(x)
        for scale in (1.0, -2.0):
            wanted = torch.stack([model(x * scale) for model in models])
            torch.testing.assert_close(program(x * scale), wanted)
        assert own_ops(lambda: program(x)) == set()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # torch's own use
@pytest.mark.usefixtures("any_size")
def test_where_each_op_is_seen_or_transformed_torchs_run() -> None:
    ens, models = build()
    x = drawn(2, 2, 17, 16)

    def loss(x: Tensor) -> Tensor:
        return ens(x).square().sum()

    def plain(x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in models]).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), torch.func.grad(plain)(x))
    tangents = (drawn(*x.shape),)
    found, wanted = (torch.func.jvp(f, (x,), tangents) for f in (loss, plain))
    torch.testing.assert_close(found, wanted)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        given, own = x.clone().requires_grad_(), x.clone().requires_grad_()
        assert own_ops(lambda: loss(given).backward()).isdisjoint({"_MaxPool", "_AvgPool"})
        plain(own).backward()
    torch.testing.assert_close(given.grad, own.grad)


def test_small_pools_and_channels_last_are_left_to_torch() -> None:
    small, large = drawn(2, 3, 8, 8), drawn(4, 64, 32, 32)
    last = large.contiguous(memory_format=torch.channels_last)
    for pool, name in ((max_pool, "max"), (avg_pool, "avg")):
        for x, is_ours in ((small, False), (large, True), (last, False)):
            assert bool(own_ops(lambda pool=pool, x=x: pool(2, x, 2))) is not is_ours
            given = x.clone().requires_grad_()
            ran = own_ops(lambda pool=pool, given=given: pool(2, given, 3, 1, 1))
            assert (f"_{name.title()}Pool" in ran) is is_ours


def test_averages_are_ours_where_that_pays() -> None:
    x = drawn(4, 64, 28, 28)
    assert not own_ops(lambda: avg_pool(2, x, 4))
    assert own_ops(lambda: avg_pool(2, x, 7))  # torch sums whole rows
    assert not own_ops(lambda: avg_pool(2, x, 7, 1))
    given = x.clone().requires_grad_()
    assert "_AvgPool" not in own_ops(lambda: avg_pool(2, given, 4))
    assert "_AvgPool" in own_ops(lambda: avg_pool(2, given, 3, 1))


def test_as_many_operations_as_a_large_window_needs_have_to_pay() -> None:
    x = drawn(1, 3, 224, 224)
    for pool in (max_pool, avg_pool):
        assert own_ops(lambda pool=pool: pool(2, x, 224))  # 448 operations, for 150,528 steps
    assert not own_ops(lambda: max_pool(2, x, 3, 2))
