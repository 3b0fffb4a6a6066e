"""Recurrent layers: a step of all members where they are small and many, else one after another."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import oracles
from unisono import Ensemble, per_member

N, T, B, FEATURES, HIDDEN = 16, 5, 3, 4, 6

KINDS: dict[str, Callable[..., nn.Module]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without bias": {"bias": False},
    "three layers": {"num_layers": 3},
    "batch first": {"batch_first": True},
    "both directions": {"bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
}


def build(kind: str, n: int = N, **options: Any) -> tuple[Ensemble, list[nn.Module]]:
    torch.manual_seed(0)
    models = [KINDS[kind](FEATURES, HIDDEN, **options).double() for _ in range(n)]
    return Ensemble(models, strategy="fused"), models


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rule_of(ens: Ensemble, *args: Any) -> tuple[str, str]:
    """How the recurrent op ran."""
    ops = [op for op in ens.explain(*args).ops if op.op in KINDS]
    assert len(ops) == 1
    return ops[0].how, ops[0].rule


def count_products(run: Callable[[], Any]) -> tuple[int, Any]:
    """How many batched products a call takes, and what it returns; nothing sees its ops inside."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = run()
    names = [event.name for event in profiler.events()]
    return names.count("aten::bmm") + names.count("aten::baddbmm"), result


def check_equal(ens: Ensemble, models: list[nn.Module], rows: list[tuple[Any, ...]]) -> None:
    """Outputs, states and gradients are those of the loop, with and without recording them."""
    args, _ = oracles.stack_inputs([(row, {}) for row in rows])
    wanted = oracles.loop_outputs(models, [(row, {}) for row in rows])
    with torch.no_grad():
        oracles.assert_outputs_equal(ens(*args), wanted)
    found = ens(*args)
    oracles.assert_outputs_equal(found, wanted)
    weigh(found).backward()
    torch.stack([weigh(each) for each in wanted]).sum().backward()
    for name, parameter in ens.members.named_parameters():
        gradients = [model.get_parameter(name).grad for model in models]
        torch.testing.assert_close(parameter.grad, torch.stack(gradients))  # type: ignore[arg-type]


def weigh(found: Any) -> Tensor:
    """A number on which outputs and states have a say, each in another way."""
    y, state = found
    states = state if isinstance(state, tuple) else (state,)
    return y.square().sum() + sum(k * s.sum() for k, s in enumerate(states, start=2))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_all_members_equals_the_loop(kind: str, option: str) -> None:
    ens, models = build(kind, **OPTIONS[option])
    check_equal(ens, models, [(drawn(T, B, FEATURES) * (i + 1),) for i in range(N)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_and_states_for_all(kind: str) -> None:
    ens, models = build(kind)
    x, h = drawn(T, B, FEATURES), drawn(1, B, HIDDEN)
    state = (h, h + 1) if kind == "lstm" else h
    found, wanted = ens(x, state), [model(x, state) for model in models]
    oracles.assert_outputs_equal(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_their_own_and_their_gradients(kind: str) -> None:
    ens, models = build(kind)
    x, h = drawn(N, T, B, FEATURES), drawn(N, 1, B, HIDDEN)
    given, own = h.clone().requires_grad_(), h.clone().requires_grad_()
    state = (given, 2 * given) if kind == "lstm" else given
    found = ens(per_member(x), per_member(state))
    rows = [(own[i], 2 * own[i]) if kind == "lstm" else own[i] for i in range(N)]
    wanted = [model(each, row) for model, each, row in zip(models, x, rows, strict=True)]
    oracles.assert_outputs_equal(found, wanted)
    weigh(found).backward()
    torch.stack([weigh(each) for each in wanted]).sum().backward()
    torch.testing.assert_close(given.grad, own.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_one_weight_for_all_members(kind: str) -> None:
    torch.manual_seed(0)
    models = [KINDS[kind](FEATURES, HIDDEN).double() for _ in range(N)]
    for model in models[1:]:
        model.weight_hh_l0 = models[0].weight_hh_l0
    ens = Ensemble(models, strategy="fused", shared="weight_hh_l0")
    x = drawn(N, T, B, FEATURES)
    wanted = [model(own) for model, own in zip(models, x, strict=True)]
    found = ens(per_member(x))
    oracles.assert_outputs_equal(found, wanted)
    weigh(found).backward()
    torch.stack([weigh(each) for each in wanted]).sum().backward()
    shared = ens.members.get_parameter("weight_hh_l0")
    torch.testing.assert_close(shared.grad, models[0].weight_hh_l0.grad)


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_small_and_many_take_each_step_together(kind: str, grad: bool) -> None:
    x = drawn(T, B, FEATURES)
    calls = {}
    for n in (2, N):
        ens, _ = build(kind, n)
        with torch.set_grad_enabled(grad):
            assert rule_of(ens, x) == ("rule", kind)
            calls[n], _ = count_products(lambda ens=ens: ens(x))
    # Two members run by torch's own op, in which there are no batched products.
    assert calls == {2: 0, N: T + 1}


def test_large_ones_run_one_after_another() -> None:
    for hidden, batch in ((300, 1), (64, 128)):
        models = [nn.GRU(2, hidden) for _ in range(4)]
        ens = Ensemble(models, strategy="fused")
        x = torch.randn(2, batch, 2)
        with torch.no_grad():
            products, found = count_products(lambda ens=ens, x=x: ens(x))
        assert products == 0
        oracles.assert_outputs_equal(found, [model(x) for model in models])


def test_outputs_lie_in_memory_as_those_of_a_member_do() -> None:
    models = [nn.LSTM(3, 4, batch_first=True) for _ in range(3)]
    ens = Ensemble(models, strategy="fused")
    x = torch.randn(5, 7, 3)
    assert ens(x)[0].stride()[1:] == models[0](x)[0].stride()


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_dropout_between_layers_draws_as_asked(randomness: str) -> None:
    models = [nn.GRU(FEATURES, HIDDEN, 2, dropout=0.5) for _ in range(N)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    ens = Ensemble(models, strategy="fused", randomness=randomness)
    y = ens(torch.randn(T, B, FEATURES))[0]
    same = [torch.equal(y[0], y[i]) for i in range(1, N)]
    assert all(same) if randomness == "same" else not any(same)


def test_a_projection_runs_one_after_another() -> None:
    ens, models = build("lstm", proj_size=2)
    check_equal(ens, models, [(drawn(T, B, FEATURES),)] * N)


def test_gradients_of_gradients() -> None:
    ens, models = build("gru")
    x = drawn(T, B, FEATURES)
    found = torch.autograd.grad(
        ens(x)[0].square().sum(), ens.members.weight_hh_l0, create_graph=True
    )
    of_gradient = torch.autograd.grad(found[0].square().sum(), ens.members.weight_ih_l0)[0]
    for i, model in enumerate(models):
        own = torch.autograd.grad(model(x)[0].square().sum(), model.weight_hh_l0, create_graph=True)
        wanted = torch.autograd.grad(own[0].square().sum(), model.weight_ih_l0)[0]
        torch.testing.assert_close(of_gradient[i], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_transforms_around_an_ensemble(kind: str) -> None:
    ens, models = build(kind)
    x = drawn(T, B, FEATURES)
    found = torch.func.grad(lambda x: ens(x)[0].square().sum())(x)
    wanted = [torch.func.grad(lambda x, m=m: m(x)[0].square().sum())(x) for m in models]
    torch.testing.assert_close(found, torch.stack(wanted).sum(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_capture_reads_weights_and_inputs_live(kind: str) -> None:
    ens, models = build(kind)
    with torch.no_grad():
        program = ens.capture(drawn(T, B, FEATURES))
        for model, parameter in itertools.product(models, ("weight_hh_l0", "bias_ih_l0")):
            model.get_parameter(parameter).mul_(1.5)
        for name in ("weight_hh_l0", "bias_ih_l0"):
            ens.members.get_parameter(name).mul_(1.5)
        x = drawn(T, B, FEATURES) - 1
        oracles.assert_outputs_equal(program(x), [model(x) for model in models])


def test_autocast_is_that_of_the_loop() -> None:
    torch.manual_seed(0)
    models = [nn.GRU(FEATURES, HIDDEN) for _ in range(N)]
    ens = Ensemble(models, strategy="fused")
    x = torch.randn(T, B, FEATURES)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = ens(x), [model(x) for model in models]
    assert found[0].dtype == wanted[0][0].dtype
    oracles.assert_outputs_equal(found, wanted)
