"""Planning: measured once per kind of call, without a trace, and never where it must not be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unisono
from unisono import Ensemble, per_member
from unisono.engine.planning import measuring
from unisono.engine.planning.plan import Plan
from unisono.engine.planning.remembered import forget


@pytest.fixture(autouse=True)
def no_plans_of_other_tests() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reasons of the plans that were measured, as they are made."""
    made: list[str] = []
    measure = measuring.measure

    def counted(*args: Any, **kwargs: Any) -> Plan:
        plan = measure(*args, **kwargs)
        made.append(plan.strategy)
        return plan

    monkeypatch.setattr(measuring, "measure", counted)
    return made


class Net(nn.Module):
    """Everything that a call may leave a trace in."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.calls = 0
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.dropout(self.norm(self.linear(x)))
        self.last = y.detach().mean(0)
        return y


def make(n: int = 4, **options: Any) -> Ensemble:
    return Ensemble([Net() for _ in range(n)], **options)


def small(**options: Any) -> Ensemble:
    return Ensemble([nn.Sequential(nn.Linear(4, 3), nn.ReLU()) for _ in range(4)], **options)


# Measured once


def test_a_kind_of_call_is_measured_once(measured: list[str]) -> None:
    ens = small()
    x = torch.randn(8, 4)
    for _ in range(3):
        ens(x)
        ens(x.clone())
    assert len(measured) == 1


KINDS: dict[str, Callable[[Ensemble], Any]] = {
    "another power of two of the batch": lambda ens: ens(torch.randn(9, 4)),
    "per member": lambda ens: ens(per_member(torch.randn(4, 8, 4))),
    "no gradients": lambda ens: torch.no_grad()(ens)(torch.randn(8, 4)),
    "inference mode": lambda ens: torch.inference_mode()(ens)(torch.randn(8, 4)),
    "eval": lambda ens: ens.eval()(torch.randn(8, 4)),
    "a gradient of the input": lambda ens: ens(torch.randn(8, 4, requires_grad=True)),
    "another layout": lambda ens: ens(torch.randn(4, 8).T),
    "another function": lambda ens: ens.run(lambda m, x: m(x).sum(), torch.randn(8, 4)),
    "another dtype": lambda ens: ens.double()(torch.randn(8, 4).double()),
    "autocast": lambda ens: torch.autocast("cpu", torch.bfloat16)(ens)(torch.randn(8, 4)),
    "chunks": lambda ens: (setattr(ens, "chunk_size", 2), ens(torch.randn(8, 4))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_of_call_is_measured_anew(measured: list[str], kind: str) -> None:
    ens = small()
    ens(torch.randn(8, 4))
    KINDS[kind](ens)
    assert len(measured) == 2
    KINDS[kind](ens)
    assert len(measured) == 2


@pytest.mark.parametrize("batch", [5, 6, 7, 8])
def test_a_smaller_last_minibatch_is_no_other_kind(measured: list[str], batch: int) -> None:
    ens = small()
    ens(torch.randn(8, 4))
    ens(torch.randn(batch, 4))
    assert len(measured) == 1


def test_numbers_among_the_arguments_are_no_other_kind(measured: list[str]) -> None:
    ens = small()
    for step in range(3):
        ens.run(lambda member, x, step: member(x) * step, torch.randn(8, 4), step)
    assert len(measured) == 1


def test_an_ensemble_of_the_same_make_needs_no_measuring(measured: list[str]) -> None:
    x = torch.randn(8, 4)
    small()(x)
    small()(x)
    assert len(measured) == 1
    Ensemble([nn.Sequential(nn.Linear(4, 3), nn.Tanh()) for _ in range(4)])(x)
    assert len(measured) == 2


def test_two_threads_measure_once(measured: list[str]) -> None:
    ens, x = small(), torch.randn(8, 4)
    threads = [threading.Thread(target=ens, args=(x,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(measured) == 1


@pytest.mark.parametrize("strategy", ["fused", "vmap", "loop"])
def test_a_strategy_that_was_asked_for_is_not_measured(measured: list[str], strategy: str) -> None:
    small(strategy=strategy)(torch.randn(8, 4))
    assert not measured


# Without a trace


def test_measuring_leaves_no_trace() -> None:
    auto, fused = make(), None
    fused = Ensemble(auto.unstack(), strategy="fused")
    x = torch.randn(8, 4, requires_grad=True)
    called: list[str] = []
    auto.linear_hook = auto.members.get_parameter("linear.weight").register_hook(  # type: ignore[assignment]
        lambda grad: called.append("parameter")
    )
    auto.register_forward_hook(lambda *_: called.append("ensemble"))
    torch.manual_seed(3)
    # explain makes the plan, and runs nothing that counts
    plan = auto.explain(x)
    assert plan.candidates
    assert not called
    assert torch.equal(
        torch.random.get_rng_state(), (torch.manual_seed(3), torch.get_rng_state())[1]
    )
    assert x.grad is None
    for name, parameter in auto.named_parameters():
        assert parameter.grad is None, name
    for name, buffer in auto.named_buffers():
        assert torch.equal(buffer, fused.get_buffer(name)), name
    assert auto[0].calls == 0


def test_the_first_call_counts_as_one() -> None:
    ens = make()
    ens(torch.randn(8, 4))
    assert ens[0].calls == 1
    assert ens.members.get_buffer("norm.num_batches_tracked").tolist() == [1] * 4


def test_inputs_that_forward_writes_to_are_written_to_once() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor, counter: dict[str, int]) -> Tensor:
            counter["calls"] = counter["calls"] + 1
            return self.linear(x)

    ens = Ensemble([Counts() for _ in range(3)])
    counter = {"calls": 0}
    plan = ens.explain(torch.randn(8, 4), counter)
    assert plan.candidates
    assert counter == {"calls": 0}


def test_the_users_hooks_on_members_run_for_calls_only() -> None:
    seen: list[int] = []
    models = [nn.Sequential(nn.Linear(4, 2), nn.ReLU()) for _ in range(3)]
    for model in models:
        model[0].register_forward_hook(count, with_kwargs=False)
    count.seen = seen  # type: ignore[attr-defined]
    ens = Ensemble(models)
    x = torch.randn(8, 4)
    plan = ens.explain(x)
    assert plan.candidates
    assert not seen
    ens(x)
    assert len(seen) == (3 if plan.strategy == "loop" else 1)


def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
    count.seen.append(1)  # type: ignore[attr-defined]


def test_hooks_that_are_part_of_the_forward_run_while_measuring() -> None:
    models = [nn.utils.spectral_norm(nn.Linear(4, 4)) for _ in range(3)]
    ens = Ensemble(models).eval()
    x = torch.randn(8, 4)
    torch.testing.assert_close(ens(x), torch.stack([model.eval()(x) for model in models]))


# The cost of planning


@pytest.mark.parametrize("grad", [True, False])
def test_planning_takes_at_most_twelve_passes_of_the_slowest_way(grad: bool) -> None:
    passes: list[str] = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            passes.append(threading.current_thread().name)
            return super().forward(x)

    n = 8
    ens = Ensemble([Counted(4, 4) for _ in range(n)])
    with torch.set_grad_enabled(grad):
        plan = ens.explain(torch.randn(8, 4))
    # The slowest way is the loop, which calls forward n times; explain itself runs two more.
    assert "loop" in plan.candidates
    assert len(passes) <= 12 * n + 2 * n


# By rule, where nothing may be measured


def by_checkpoint(ens: Ensemble, x: Tensor) -> Tensor:
    return checkpoint(ens, x.requires_grad_(), use_reentrant=False)  # type: ignore[no-any-return]


def by_deterministic(ens: Ensemble, x: Tensor) -> Tensor:
    torch.use_deterministic_algorithms(True)
    try:
        return ens(x)  # type: ignore[no-any-return]
    finally:
        torch.use_deterministic_algorithms(False)


NOT_MEASURED: dict[str, Callable[[Ensemble, Tensor], Tensor]] = {
    "deterministic": by_deterministic,
    "torch.func.vmap": lambda ens, x: torch.func.vmap(ens, out_dims=1)(x),
    "torch.func.jacrev": lambda ens, x: torch.func.jacrev(ens)(x).diagonal()[..., 0, 0, 0],
    "checkpoint": by_checkpoint,
    "meta": lambda ens, x: ens.to("meta")(x.to("meta")),
}


@pytest.mark.parametrize("where", NOT_MEASURED)
def test_by_rule(measured: list[str], where: str) -> None:
    ens = small()
    x = torch.randn(8, 4)
    for _ in range(2):
        NOT_MEASURED[where](ens, x)
    assert not measured


def test_a_plan_by_rule_does_not_keep_later_calls_from_being_measured(measured: list[str]) -> None:
    ens = small()
    x = torch.randn(8, 4)
    torch.func.jacrev(ens)(x)
    ens(x)
    assert len(measured) == 1


def test_deterministic_algorithms_take_no_measured_plan() -> None:
    ens = small()
    x = torch.randn(8, 4)
    ens(x)
    torch.use_deterministic_algorithms(True)
    try:
        plan = ens.explain(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert plan.strategy == "fused"
    assert plan.reason == (
        "by rule all members at once: deterministic algorithms are asked for, and timing is not"
        " deterministic"
    )


# The choice


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({"fused": 1.0, "loop": 3.0, "vmap": 2.0}, ("fused", None)),
        ({"fused": 3.0, "loop": 1.0, "vmap": 2.0}, ("loop", None)),
        ({"fused": 3.0, "loop": 2.0, "vmap": 1.0}, ("vmap", None)),
        ({"fused": 1.01, "loop": 3.0, "vmap": 1.0}, ("fused", None)),  # a tie
        ({"fused": 1.02, "loop": 3.0, "vmap": 1.0}, ("vmap", None)),
        ({"fused": 1.05, "loop": 3.0, "fused, 2 at a time": 1.0}, ("fused", None)),
        ({"fused": 3.0, "loop": 2.0, "fused, 2 at a time": 1.0}, ("fused", 2)),
    ],
)
def test_the_fastest_is_chosen_and_run(
    monkeypatch: pytest.MonkeyPatch, times: dict[str, float], expected: tuple[str, int | None]
) -> None:
    monkeypatch.setattr(measuring, "formats_of", lambda _: ("contiguous",))
    monkeypatch.setattr(
        measuring,
        "contest",
        lambda first, run, handicaps: dict(sorted(times.items(), key=lambda i: i[1])),
    )
    ens = small()
    x = torch.randn(8, 4)
    plan = ens.explain(x)
    assert (plan.strategy, plan.chunk_size) == expected
    fastest = min(times, key=times.__getitem__)
    is_tie = plan.title != fastest
    what = f"about as fast as {fastest}, and simpler," if is_tie else "the fastest"
    assert plan.reason.startswith(f"{what} when the first call of this kind was timed")
    torch.testing.assert_close(ens(x), torch.stack([member(x) for member in ens]))


@pytest.mark.parametrize("free", [True, False])
def test_another_order_in_memory_only_where_the_parameters_are_free(
    monkeypatch: pytest.MonkeyPatch, free: bool
) -> None:
    times = {"fused, transposed": 1.0, "fused": 2.0, "loop": 3.0}
    monkeypatch.setattr(measuring, "contest", lambda first, run, handicaps: times)
    ens = small(shared=())
    x = torch.randn(8, 4)
    if not free:
        ens.strategy = "fused"
        ens(x).sum().backward()
        ens.strategy = "auto"
    plan = ens.explain(x)
    assert plan.memory_format == ("transposed" if free else "contiguous")
    what = "the fastest" if free else "the fastest that leaves the parameters where they are, since"
    assert plan.reason.startswith(what)
    assert ens.members.get_parameter("0.weight").is_contiguous() != free


def test_torchs_own_vmap_is_no_candidate_where_its_gradient_is_wrong() -> None:
    ens = Ensemble([nn.Embedding(5, 3, padding_idx=0) for _ in range(3)])
    assert "vmap" not in ens.explain(torch.tensor([1, 2])).candidates


# Options that change later


def test_changed_options_hold_from_the_next_call_on() -> None:
    ens = small()
    x = torch.randn(8, 4)
    ens(x)
    ens.strategy = "loop"
    assert ens.explain(x).strategy == "loop"
    ens.strategy, ens.chunk_size = "fused", 2
    assert (ens.explain(x).strategy, ens.explain(x).chunk_size) == ("fused", 2)


def test_plans_are_public() -> None:
    assert isinstance(small().explain(torch.randn(8, 4)), unisono.Plan)
