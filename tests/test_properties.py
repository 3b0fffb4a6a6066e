"""What every ensemble promises, for every model of the table, against the loop."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracles
from cases import CASES, Case, N, members
from unisono import Ensemble
from unisono.engine.kernels import noted
from unisono.engine.rules import BY_MEMBER, RULES
from unisono.engine.tree import leaves, tree_map

# torch.vmap itself warns of its slow fallbacks; that fused has none is tested below.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

strategies = pytest.mark.parametrize("strategy", oracles.STRATEGIES)
sharings = pytest.mark.parametrize("sharing", ["shared", "per-member"])
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
cases = pytest.mark.parametrize("case", CASES)


def make_inputs(case: Case, sharing: str, n: int = N) -> tuple[list[Any], Any, dict[str, Any]]:
    """Inputs for each member of the loop, and the same as one call of the ensemble."""
    if sharing == "shared":
        args, kwargs = case.inputs()
        return [(args, kwargs)] * n, args, kwargs
    inputs = [case.inputs() for _ in range(n)]
    args, kwargs = oracles.stack_inputs(inputs)
    return inputs, args, kwargs


def make(case: Case, strategy: str, training: bool, n: int = N) -> tuple[Ensemble, list[nn.Module]]:
    """An ensemble, and the models that it was made of."""
    if strategy == "vmap" and case.refused_by_vmap:
        ens = Ensemble(members(case, n), strategy="vmap")
        with pytest.raises(RuntimeError, match=case.refused_by_vmap.rpartition(" ")[2]):
            ens(*case.inputs()[0])
        pytest.skip(case.refused_by_vmap)
    if case.random_in_training and training:
        pytest.skip("draws random numbers: equal in distribution only, see test_engine.py")
    models = [model.train(training) for model in members(case, n)]
    return Ensemble(models, strategy=strategy), models


def expect_torchs_fault(
    request: pytest.FixtureRequest, case: Case, strategy: str, sharing: str
) -> None:
    """Strict: the day torch mends it, the test says so."""
    if strategy == "vmap" and sharing == "per-member" and case.wrong_gradient_under_vmap:
        reason = case.wrong_gradient_under_vmap
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))


def tolerance(case: Case) -> dict[str, float]:
    return oracles.TOLERANCES.get(case.dtype, {})


@cases
@strategies
@sharings
@modes
def test_outputs_and_buffers_equal_the_loop(
    case: Case, strategy: str, sharing: str, training: bool
) -> None:
    ens, models = make(case, strategy, training)
    for _ in range(2):  # the second call sees what the first one stored
        inputs, args, kwargs = make_inputs(case, sharing)
        with torch.no_grad():
            outputs = ens(*args, **kwargs)
            expected = oracles.loop_outputs(models, inputs)
        oracles.assert_outputs_equal(outputs, expected, **tolerance(case))
        oracles.assert_state_equal(ens, models, **tolerance(case))


@cases
@strategies
@sharings
@modes
def test_gradients_equal_the_loop(
    request: pytest.FixtureRequest, case: Case, strategy: str, sharing: str, training: bool
) -> None:
    expect_torchs_fault(request, case, strategy, sharing)
    ens, models = make(case, strategy, training)
    inputs, args, kwargs = make_inputs(case, sharing)
    require = [leaf for _, leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    require = [leaf for leaf in require if leaf.is_floating_point()]
    if sharing == "shared":
        for leaf in require:
            leaf.requires_grad_()
    outputs = ens(*args, **kwargs)
    if not any(leaf.requires_grad for _, leaf in leaves(outputs) if isinstance(leaf, Tensor)):
        assert not any(p.requires_grad for p in ens.parameters())
        return
    sum(oracles.total(member_of(outputs, i)) for i in range(N)).backward()
    got = [leaf.grad for leaf in require]
    for leaf in require:
        leaf.grad = None
    expected = oracles.loop_outputs(models, inputs)
    sum(oracles.total(output) for output in expected).backward()
    oracles.assert_gradients_equal(ens, models, **tolerance(case))
    if sharing == "shared":
        for mine, leaf in zip(got, require, strict=True):
            torch.testing.assert_close(mine, leaf.grad, **tolerance(case))


def member_of(outputs: Any, i: int) -> Any:
    return tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, outputs)


@cases
@strategies
@sharings
def test_three_steps_of_sgd_equal_the_loop(
    request: pytest.FixtureRequest, case: Case, strategy: str, sharing: str
) -> None:
    expect_torchs_fault(request, case, strategy, sharing)
    ens, models = make(case, strategy, training=True)
    if not any(p.requires_grad for p in ens.parameters()):
        pytest.skip("nothing to train")
    batches = [make_inputs(case, sharing) for _ in range(3)]
    together = torch.optim.SGD([p for p in ens.parameters() if p.requires_grad], 1e-3, 0.9)
    alone = [
        torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 1e-3, 0.9) for m in models
    ]
    mine, theirs = iter(batches), iter(batches)

    def step() -> Tensor:
        _, args, kwargs = next(mine)
        outputs = ens(*args, **kwargs)
        return sum(oracles.total(member_of(outputs, i)) for i in range(N))

    def loop_step() -> Tensor:
        inputs, _, _ = next(theirs)
        return sum(oracles.total(o) for o in oracles.loop_outputs(models, inputs))

    got = oracles.train_steps(step, [together])
    want = oracles.train_steps(loop_step, alone)
    torch.testing.assert_close(got, want, **tolerance(case))
    oracles.assert_state_equal(ens, models, **tolerance(case))


@cases
@strategies
def test_chunks_of_members_equal_the_whole(case: Case, strategy: str) -> None:
    ens, models = make(case, strategy, training=False)
    ens.chunk_size = 2  # 2 + 1
    inputs, args, kwargs = make_inputs(case, "per-member")
    oracles.assert_outputs_equal(
        ens(*args, **kwargs), oracles.loop_outputs(models, inputs), **tolerance(case)
    )


@cases
def test_permuting_members_permutes_results(case: Case) -> None:
    ens, _ = make(case, "fused", training=False)
    args, kwargs = case.inputs()
    order = [2, 0, 1]
    permuted = ens[order](*args, **kwargs)
    outputs = ens(*args, **kwargs)
    oracles.assert_outputs_equal(
        permuted, [member_of(outputs, i) for i in order], **tolerance(case)
    )


@cases
def test_a_member_changes_only_its_own_output_and_gradient(case: Case) -> None:
    ens, _ = make(case, "fused", training=False)
    if not list(ens.parameters()):
        pytest.skip("no parameters")
    args, kwargs = case.inputs()
    before = copy.deepcopy(ens)(*args, **kwargs)
    with torch.no_grad():
        for parameter in ens.parameters():
            parameter[1] += 0.25
    outputs = ens(*args, **kwargs)
    for i in (0, 2):
        for (_, got), (_, want) in zip(
            leaves(member_of(outputs, i)), leaves(member_of(before, i)), strict=True
        ):
            torch.testing.assert_close(got, want) if isinstance(got, Tensor) else None
    changed = zip(leaves(member_of(outputs, 1)), leaves(member_of(before, 1)), strict=True)
    assert any(
        isinstance(a, Tensor) and not torch.equal(a, b) for (_, a), (_, b) in changed
    ) or all(leaf.numel() == 0 for _, leaf in leaves(outputs) if isinstance(leaf, Tensor))
    oracles.total(member_of(outputs, 1)).backward()
    for name, parameter in ens.named_parameters():
        if parameter.grad is not None:
            assert not parameter.grad[[0, 2]].any(), name


@cases
@strategies
def test_one_member_equals_the_model(case: Case, strategy: str) -> None:
    ens, models = make(case, strategy, training=False, n=1)
    args, kwargs = case.inputs()
    oracles.assert_outputs_equal(
        ens(*args, **kwargs), [models[0](*args, **kwargs)], **tolerance(case)
    )


@cases
def test_unstacking_gives_back_the_models_bitwise(case: Case) -> None:
    models = members(case)
    for got, want in zip(Ensemble(models).unstack(), models, strict=True):
        assert type(got).__qualname__ == type(want).__qualname__  # torch copies parametrised ones
        state, expected = got.state_dict(), want.state_dict()
        assert list(state) == list(expected)
        for name, tensor in expected.items():
            assert torch.equal(state[name], tensor)
            assert state[name].dtype == tensor.dtype
            assert state[name].stride() == tensor.stride()
        assert [p.requires_grad for p in got.parameters()] == [
            p.requires_grad for p in want.parameters()
        ]


@cases
def test_parameters_are_n_times_one_and_none_is_unused(case: Case) -> None:
    models = members(case)
    ens = Ensemble(models)
    assert sum(p.numel() for p in ens.parameters()) == N * sum(
        p.numel() for p in models[0].parameters()
    )
    assert list(ens.state_dict()) == [f"members.{name}" for name in models[0].state_dict()]
    assert [name for name, _ in ens.named_parameters()] == [
        f"members.{name}" for name, _ in models[0].named_parameters()
    ]


@cases
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(case: Case, how: str) -> None:
    ens, models = make(case, "auto", training=False)
    if how in ("pickle", "torch.save") and not _picklable(models[0]):
        pytest.skip("the model itself can't be pickled")
    args, kwargs = case.inputs()
    ens(*args, **kwargs)  # so that there is something lent and remembered
    if how == "state_dict":
        other = Ensemble([copy.deepcopy(m) for m in members(case)]).eval()
        file = io.BytesIO()
        torch.save(ens.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        for name, tensor in ens.named_buffers():  # buffers that are not saved
            other.get_buffer(name).copy_(tensor)
    elif how == "deepcopy":
        other = copy.deepcopy(ens)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(ens))
    else:
        file = io.BytesIO()
        torch.save(ens, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    if "plain" not in repr(case) and not hasattr(models[0], "calls"):
        outputs, expected = other(*args, **kwargs), ens(*args, **kwargs)
        oracles.assert_outputs_equal(
            outputs, [member_of(expected, i) for i in range(N)], **tolerance(case)
        )
    mine = {p.data_ptr() for p in ens.parameters() if p.numel()}
    assert not mine & {p.data_ptr() for p in other.parameters()}


def _picklable(model: nn.Module) -> bool:
    try:
        pickle.dumps(model)
    except Exception:
        return False
    return True


@cases
def test_fused_uses_the_rules_of_the_case_and_no_slow_fallback(case: Case) -> None:
    ens, _ = make(case, "fused", training=False)
    _, args, kwargs = make_inputs(case, "per-member")
    ft = torch._C._functorch
    ft._set_vmap_fallback_enabled(False)  # torch's own loop over members becomes an error
    try:
        with noted() as notes:
            ens(*args, **kwargs)
            with torch.no_grad():
                ens(*args, **kwargs)
    finally:
        ft._set_vmap_fallback_enabled(True)
    assert {note.op for note in notes} >= case.rules


def test_every_rule_has_a_case() -> None:
    tested = set(itertools.chain.from_iterable(param.values[0].rules for param in CASES))
    assert set(RULES) <= tested <= {*RULES, *BY_MEMBER}
