"""Op by op: what runs for one member after another, what is left to the loop, what is said."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unisono import Ensemble, per_member
from unisono.engine.axis import Randomness
from unisono.engine.call import fused, in_chunks
from unisono.engine.opbyop.conventions import name_of
from unisono.engine.opbyop.detour import Detour
from unisono.engine.opbyop.fallback import MembersDisagree, op_by_op
from unisono.engine.opbyop.remedies import detour_text, fallback_text
from unisono.engine.parts import Call
from unisono.engine.where import first_sentence

N = 3
X = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4).sin()
Fn = Callable[..., Any]


@pytest.fixture
def ens() -> Ensemble:
    torch.manual_seed(0)
    return Ensemble([nn.Sequential(nn.Linear(4, 4)).double() for _ in range(N)])


def run(
    ens: Ensemble,
    fn: Fn,
    *args: Any,
    randomness: Randomness = "different",
    detours: list[Detour] | None = None,
    chunk_size: int = N,
) -> Any:
    pool = ens._planner.pool
    template = pool.take()
    call = Call(fn, args or (X,), {}, N, randomness)
    strategy = partial(op_by_op, detours=detours)
    if chunk_size < N:
        strategy = in_chunks(strategy, chunk_size)
    try:
        return strategy(template, template.values(), call).outputs
    finally:
        pool.give_back(template)


def assert_equal_to_loop(ens: Ensemble, fn: Fn, found: Tensor) -> None:
    torch.testing.assert_close(found, torch.stack([fn(member, X.clone()) for member in ens]))


def with_mask(member: nn.Module, x: Tensor) -> Tensor:
    y = member(x).clone()
    y[y > 0] = y.mean()
    return y


# What is noted, and said --------------------------------------------------------------------------


def test_each_place_is_noted_once_by_module_line_and_op(ens: Ensemble) -> None:
    detours: list[Detour] = []
    for _ in range(2):
        run(ens, with_mask, detours=detours)
    (detour,) = detours
    line = with_mask.__code__.co_firstlineno + 2
    assert detour.path == "`Sequential.forward`"
    assert detour.line == f"test_fallback.py:{line}"
    assert detour.op == "writing with a boolean mask"
    assert detour.reason.startswith("vmap: We do not support batching operators")


def texts(ens: Ensemble, fn: Fn) -> tuple[bool, str]:
    """Whether the call is left to the loop, and what the planner will say."""
    pool = ens._planner.pool
    template, call, detours = pool.take(), Call(fn, (X,), {}, N, "different"), []
    try:
        with pytest.raises(RuntimeError, match=r"vmap|functorch|Batching rule") as info:
            fused(template, template.values(), call)
        try:
            op_by_op(template, template.values(), call, detours)
        except MembersDisagree as error:
            return True, fallback_text(template, call, error)
        return False, detour_text(template, call, detours, info.value)
    finally:
        pool.give_back(template)


def test_the_text_for_an_op_that_runs_member_by_member(ens: Ensemble) -> None:
    line = with_mask.__code__.co_firstlineno + 2
    by_loop, text = texts(ens, with_mask)
    assert by_loop is False
    assert text == (
        "Ensemble of 3 Sequential: forward can't run for all members at once as it stands; from now"
        " on it runs at once except for this:\n"
        f"  `Sequential.forward`, test_fallback.py:{line}: writing with a boolean mask,"
        " for one member after another\n"
        "    reason: vmap: We do not support batching operators that can support dynamic shape\n"
        "    remedy: use torch.where(mask, a, b) instead of x[mask]\n"
        '  strategy="loop" runs all of it member by member and says nothing'
    )


def writes_fresh(member: nn.Module, x: Tensor) -> Tensor:
    z = torch.zeros(5, 4, dtype=x.dtype)
    z[:] = member(x)
    return z


def test_the_text_for_tensors_made_in_forward(ens: Ensemble) -> None:
    by_loop, text = texts(ens, writes_fresh)
    assert by_loop is False
    assert text == (
        "Ensemble of 3 Sequential: forward can't run for all members at once as it stands; from now"
        " on it runs at once except for this:\n"
        "  `Sequential.forward`: every member gets its own copy of the inputs and of the tensors"
        " made there\n"
        "    reason: RuntimeError: vmap: inplace arithmetic(self, *extra_args) is not possible"
        " because there exists a Tensor `other` in extra_args that has more elements than `self`\n"
        "    remedy: create the tensor from an input: x.new_zeros(...) instead of"
        " torch.zeros(...)\n"
        '  strategy="loop" runs all of it member by member and says nothing'
    )


def branches(member: nn.Module, x: Tensor) -> Tensor:
    y = member(x)
    return y if y[0, 0] > 0 else -y


def test_the_text_for_members_that_go_different_ways(ens: Ensemble) -> None:
    line = branches.__code__.co_firstlineno + 2
    by_loop, text = texts(ens, branches)
    assert by_loop is True
    assert text == (
        f"Ensemble of 3 Sequential: `Sequential.forward`, test_fallback.py:{line} can't run for all"
        ' members at once, so this call runs member by member from now on (strategy "loop").\n'
        "  reason: Tensor.__bool__: the members gave different values: True, False\n"
        "  remedy: keep it a tensor: torch.where(condition, a, b) instead of `if`, and no .item()"
        ' or .tolist(); strategy="loop" says that the loop is fine, strategy="fused" makes this an'
        " error"
    )


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Calls(torch.autograd.Function):
    """Runs another function, as activation checkpoints do."""

    @staticmethod
    def forward(ctx: Any, run: Fn, x: Tensor) -> Tensor:
        return run(x)


REMEDIES = {
    "torch.where": lambda m, x: x.index_select(0, (m(x) != m(x).max()).nonzero()[:, 0]),
    "setup_context": lambda m, x: Square.apply(m(x)),
    "x.new_zeros": writes_fresh,
    "no .item()": lambda m, x: m(x) * m(x).abs().sum().sign().item(),
    "out=": lambda m, x: F.normalize(m(x).detach(), out=m(x).detach()),
}


@pytest.mark.parametrize("remedy", REMEDIES)
def test_every_kind_has_its_remedy(ens: Ensemble, remedy: str) -> None:
    by_loop, text = texts(ens, REMEDIES[remedy])
    assert not by_loop
    assert remedy in text.partition("remedy: ")[2]
    assert_equal_to_loop(ens, REMEDIES[remedy], run(ens, REMEDIES[remedy]))


def test_names_of_ops() -> None:
    assert name_of(Tensor.item) == "Tensor.item"
    assert name_of(torch.unique) == "torch.unique"
    assert name_of(F.normalize) == "torch.nn.functional.normalize"
    assert name_of(Square.apply) == "Square.apply"
    assert name_of(Tensor.__getitem__, ((X, (0, slice(1))), {})) == "indexing with a slice"
    assert name_of(Tensor.__getitem__, ((X, X > 0), {})) == "indexing with a boolean mask"
    assert name_of(Tensor.__setitem__, ((X, X.long(), 0), {})) == "writing with a tensor"
    assert first_sentence("One. Two.\nThree.") == "One"


# What goes to the loop ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda m, x: m(x)[m(x) > 0], r"tensors of different shapes: \(\d+, *\), \("),
        (lambda m, x: x * m(x).sum().item(), r"different values: -?\d+\.\d+, "),
        (lambda m, x: x[m(x)[0].argmax() :][:1], "different shapes|different places"),
        (lambda m, x: f"{m(x).sum():.6f}", "different values: '"),
        (lambda m, x: m(x).tolist(), "different values: "),
    ],
    ids=["mask", "item", "slice", "text", "list"],
)
def test_members_that_disagree(ens: Ensemble, fn: Fn, why: str) -> None:
    with pytest.raises(MembersDisagree, match=why):
        run(ens, fn)


def test_a_forward_that_catches_exceptions_does_not_take_the_other_branch(ens: Ensemble) -> None:
    def careful(member: nn.Module, x: Tensor) -> Tensor:
        try:
            return x * member(x).sum().item()
        except Exception:
            return x

    with pytest.raises(MembersDisagree, match=r"Tensor\.item"):
        run(ens, careful)


@pytest.mark.parametrize(
    "fn",
    [
        lambda m, x: x.add_(m(x)),
        lambda m, x: F.elu(x, 1.0, True),
        lambda m, x: F.dropout(x, 0.5, True, inplace=True),
        lambda m, x: x.__setitem__(m(x) > 0, 0.0),
        lambda m, x: m[0].weight.register_hook(lambda grad: grad),
        lambda m, x: Calls.apply(m, m(x)),
    ],
    ids=["add", "elu", "dropout", "mask", "hook", "callable"],
)
def test_what_would_change_a_shared_input_or_get_lost_is_refused(ens: Ensemble, fn: Fn) -> None:
    x = X.clone()
    with pytest.raises(RuntimeError):  # noqa: PT011 - the texts are torch's
        run(ens, fn, x)
    assert torch.equal(x, X)


def test_an_error_of_the_members_themselves_is_their_own(ens: Ensemble) -> None:
    with pytest.raises(IndexError, match="index 9 is out of bounds"):
        run(ens, lambda m, x: m(x)[9])


# The rest is as always ----------------------------------------------------------------------------


def test_chunks(ens: Ensemble) -> None:
    assert_equal_to_loop(ens, with_mask, run(ens, with_mask, chunk_size=2))


def test_inputs_stay_as_they_are_and_outputs_have_their_own_memory(ens: Ensemble) -> None:
    def forces(member: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        energy = member(x.requires_grad_()).square().sum()
        return torch.autograd.grad(energy, x)[0], x

    x, xs = X.clone(), torch.stack([X] * N)
    for given in (x, per_member(xs)):
        found, same = run(ens, forces, given)
        expected = [forces(member, X.clone())[0] for member in ens]
        torch.testing.assert_close(found, torch.stack(expected))
        assert same.shape == (N, 5, 4)
    _, same = run(ens, forces, x)
    with torch.no_grad():
        same[0].zero_()
    assert torch.equal(same[1], X)
    assert torch.equal(x, X)
    assert not x.requires_grad
    assert not xs.requires_grad


def test_gradients_of_gradients_and_backward_in_forward(ens: Ensemble) -> None:
    def penalty(member: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(member(x).sin().sum(), [x], create_graph=True)
        return grad.square().sum()

    members = ens.unstack()
    run(ens, penalty).sum().backward()
    for i, member in enumerate(members):
        penalty(member, X).backward()
        grad = ens.members.get_parameter("0.weight").grad[i]
        torch.testing.assert_close(grad, member[0].weight.grad)

    def inner_step(member: nn.Module, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        member(x).sin().sum().backward(inputs=[x])
        return x - x.grad

    assert_equal_to_loop(ens, inner_step, run(ens, inner_step))


def draws(member: nn.Module, x: Tensor) -> Tensor:
    noise = torch.empty(1000, dtype=x.dtype).normal_()
    return noise + 0 * member(x)[member(x) > -1000].sum()


def test_random_numbers(ens: Ensemble) -> None:
    found = run(ens, draws)
    # Of independent numbers the correlation is 1/sqrt(1000) = 0.03 in the mean.
    assert torch.corrcoef(found.detach()).tril(-1).abs().max() < 0.15
    same = run(ens, draws, randomness="same")
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same, run(ens, draws, randomness="same"))
    with pytest.raises(RuntimeError, match="randomness error mode"):
        run(ens, draws, randomness="error")


def test_transforms_inside_forward(ens: Ensemble) -> None:
    def per_row(member: nn.Module, x: Tensor) -> Tensor:
        y = torch.func.vmap(torch.func.jacrev(lambda row: member(row).sin()))(x)
        return y * (y * 0 + 1).mean().item()

    assert_equal_to_loop(ens, per_row, run(ens, per_row))


def test_threads_and_what_is_put_back(ens: Ensemble) -> None:
    def fn(member: nn.Module, x: Tensor) -> Tensor:
        return Square.apply(with_mask(member, x))

    original = vars(torch.autograd.Function)["apply"]
    expected = torch.stack([fn(member, X) for member in ens])
    found: list[Tensor] = []
    plain: list[Tensor] = []

    def plain_functions() -> None:
        plain.extend(Square.apply(X) for _ in range(200))

    threads = [threading.Thread(target=lambda: found.append(run(ens, fn))) for _ in range(8)]
    threads.append(threading.Thread(target=plain_functions))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for outputs in found:
        torch.testing.assert_close(outputs, expected)
    assert all(torch.equal(outputs, X * X) for outputs in plain)
    assert len(plain) == 200
    assert vars(torch.autograd.Function)["apply"] is original
