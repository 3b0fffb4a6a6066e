"""An ensemble is an ordinary module: what torch does with modules it does with an ensemble.

Each test compares with the members run one by one.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp
from torch.utils.checkpoint import checkpoint

import distributed_training
import oracles
from unisono import Ensemble, EnsembleWarning, per_member

X = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
strategies = pytest.mark.parametrize("strategy", ["auto", *oracles.STRATEGIES])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)).double()


def make(
    build: Callable[[], nn.Module] = mlp, n: int = 3, **options: Any
) -> tuple[Ensemble, list[nn.Module]]:
    models = [build() for _ in range(n)]
    return Ensemble(models, **options), models


def assert_same_gradients(
    ens: Ensemble, models: Sequence[nn.Module], x: Tensor = X, **tolerance: float
) -> None:
    """Outputs, gradients and buffers of one call against the loop."""
    outputs = ens(x)
    expected = [model(x) for model in models]
    oracles.assert_outputs_equal(outputs, expected, **tolerance)
    outputs.square().sum().backward()
    sum(output.square().sum() for output in expected).backward()
    oracles.assert_gradients_equal(ens, models, **tolerance)
    oracles.assert_state_equal(ens, models, **tolerance)


# Autocast


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 4, 2), nn.BatchNorm1d(4), nn.Flatten(), nn.Linear(8, 2))


@strategies
@pytest.mark.parametrize(
    ("build", "shape"), [(lambda: mlp().float(), (5, 3)), (convolutional, (5, 1, 3))]
)
def test_autocast(strategy: str, build: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    ens, models = make(build, strategy=strategy)
    x = torch.randn(*shape)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, expected = ens(x), [model(x) for model in models]
    assert expected[0].dtype == torch.bfloat16
    # torch.vmap takes a linear layer apart, and its addition is done in float32.
    assert outputs.dtype == (torch.float32 if strategy == "vmap" else torch.bfloat16)
    tolerance = oracles.TOLERANCES[torch.bfloat16]
    oracles.assert_outputs_equal(outputs.bfloat16(), expected, **tolerance)
    outputs.float().square().mean().backward()
    (sum(output.float().square().mean() for output in expected) / 3).backward()
    assert ens.members[0].weight.grad.dtype == torch.float32
    oracles.assert_gradients_equal(ens, models, **tolerance)
    oracles.assert_state_equal(ens, models, **tolerance)


# torch.func


@strategies
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # torch's own
def test_derivatives_by_the_input(strategy: str) -> None:
    ens, models = make(strategy=strategy)
    x, v = X[0], X[1]

    def of(module: Any) -> list[Any]:
        def scalar(x: Tensor) -> Tensor:
            return module(x).square().sum()

        return [
            jacrev(module)(x),
            jacfwd(module)(x),
            *jvp(module, (x,), (v,)),
            jvp(jacrev(module), (x,), (v,))[1],  # a Hessian times a vector
            grad(scalar)(x),
            hessian(scalar)(x),
            torch.func.vmap(module)(X).movedim(0, -2),
            torch.func.vmap(jacrev(module))(X).movedim(0, -3),
        ]

    alone = [of(model) for model in models]
    for k, got in enumerate(of(ens)):
        want = torch.stack([derivatives[k] for derivatives in alone])
        of_the_sum = k in (5, 6)  # of a scalar to which all members contribute
        torch.testing.assert_close(got, want.sum(0) if of_the_sum else want)


@strategies
def test_derivatives_by_the_parameters(strategy: str) -> None:
    ens, models = make(strategy=strategy)

    def loss(module: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, parameters, (x,)).square().sum()

    got = grad(lambda p: loss(ens, p, X))(dict(ens.named_parameters()))
    by_sample = torch.func.vmap(grad(lambda p, x: loss(ens, p, x)), (None, 0))(
        dict(ens.named_parameters()), X
    )
    for i, model in enumerate(models):
        parameters = dict(model.named_parameters())
        want = grad(lambda p, model=model: loss(model, p, X))(parameters)
        each = torch.func.vmap(grad(lambda p, x, model=model: loss(model, p, x)), (None, 0))(
            parameters, X
        )
        for name in want:
            torch.testing.assert_close(got[f"members.{name}"][i], want[name])
            torch.testing.assert_close(by_sample[f"members.{name}"][:, i], each[name])
    assert all(parameter.grad is None for parameter in ens.parameters())


@strategies
def test_other_parameters_by_functional_call(strategy: str) -> None:
    (ens, _), (other, models) = make(strategy=strategy), make()
    outputs = functional_call(ens, other.state_dict(), (X,))
    oracles.assert_outputs_equal(outputs, [model(X) for model in models])


def test_second_derivatives_by_autograd() -> None:
    ens, models = make()
    x = X.clone().requires_grad_()

    def penalty(module: nn.Module) -> Tensor:
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        return slope.square().sum()

    torch.testing.assert_close(penalty(ens[[0]]), penalty(models[0]))
    assert torch.autograd.gradcheck(ens, (x,))
    assert torch.autograd.gradgradcheck(ens, (x,))


# Modules inside of modules


class Committee(nn.Module):
    """An ensemble of heads on a common trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = Ensemble([nn.Linear(4, 2) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.trunk(x).relu())


def test_an_ensemble_as_part_of_a_module() -> None:
    module = Committee().double()
    names = [name for name, _ in module.named_parameters()]
    assert names == ["trunk.weight", "trunk.bias", "heads.members.weight", "heads.members.bias"]
    hidden = module.trunk(X).relu()
    oracles.assert_outputs_equal(module(X), [head(hidden) for head in module.heads])
    assert not module.eval().heads.members.training
    assert module.train().heads.members.training
    other = Committee().double()
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(other(X), module(X), rtol=0, atol=0)
    assert module.to(torch.float32)(X.float()).dtype == torch.float32
    torch.testing.assert_close(copy.deepcopy(other)(X), other(X), rtol=0, atol=0)


@strategies
def test_an_ensemble_of_ensembles(strategy: str) -> None:
    rows = [make(normed, strategy=strategy) for _ in range(2)]
    ens = Ensemble([row for row, _ in rows], strategy=strategy)
    outputs = ens(X)
    assert outputs.shape == (2, 3, 5, 2)
    oracles.assert_outputs_equal(outputs, [row(X) for row, _ in rows])
    oracles.assert_outputs_equal(outputs[1], [model(X) for model in rows[1][1]])
    outputs.square().sum().backward()
    sum(row(X).square().sum() for row, _ in rows).backward()
    oracles.assert_gradients_equal(ens, [row for row, _ in rows])


@strategies
def test_members_that_hold_an_ensemble(strategy: str) -> None:
    models = [Committee().double() for _ in range(3)]
    assert_same_gradients(Ensemble(models, strategy=strategy), models)


# Activation checkpointing

reentrance = pytest.mark.parametrize("reentrant", [False, True])


@strategies
@reentrance
def test_a_checkpoint_around_an_ensemble(strategy: str, reentrant: bool) -> None:
    ens, models = make(strategy=strategy)
    x = X.clone().requires_grad_()
    checkpoint(ens, x, use_reentrant=reentrant).square().sum().backward()
    mine, x.grad = x.grad, None
    sum(model(x).square().sum() for model in models).backward()
    oracles.assert_gradients_equal(ens, models)
    torch.testing.assert_close(mine, x.grad)


class Checkpointed(nn.Module):
    """Recomputes its middle in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.last = nn.Linear(4, 2)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant))


@strategies
@reentrance
def test_a_checkpoint_inside_the_members(strategy: str, reentrant: bool) -> None:
    models = [Checkpointed(reentrant).double() for _ in range(3)]
    ens = Ensemble(models, strategy=strategy)
    x = X.clone().requires_grad_()
    with pytest.warns(EnsembleWarning, match=r"checkpoint\(ens, x, use_reentrant=False\)"):
        ens(x).square().sum().backward()
    mine, x.grad = x.grad, None
    sum(model(x).square().sum() for model in models).backward()  # a plain one works as always
    oracles.assert_gradients_equal(ens, models)
    torch.testing.assert_close(mine, x.grad)


def test_a_checkpoint_beside_a_call_works_as_always() -> None:
    ens, models = make(strategy="fused")
    ens(X)
    counted: list[int] = []

    def counting(x: Tensor) -> Tensor:
        counted.append(1)
        return models[0](x)

    checkpoint(counting, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert len(counted) == 2  # once more in backward


@strategies
@reentrance
def test_checkpoints_inside_and_around(strategy: str, reentrant: bool) -> None:
    models = [Checkpointed(False).double() for _ in range(3)]
    ens = Ensemble(models, strategy=strategy)
    x = X.clone().requires_grad_()
    with pytest.warns(EnsembleWarning, match="a member calls torch.utils.checkpoint"):
        checkpoint(ens, x, use_reentrant=reentrant).square().sum().backward()
    sum(model(X).square().sum() for model in models).backward()
    oracles.assert_gradients_equal(ens, models)


# Several processes


def test_distributed_data_parallel_equals_one_process(tmp_path: Path) -> None:
    program = Path(distributed_training.__file__)
    paths = [str(program.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(tmp_path / "meet")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(distributed_training.WORLD)
    ]
    try:
        finished = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, finished, strict=True):
        assert process.returncode == 0, errors
    ens = distributed_training.build()
    losses = distributed_training.train(ens, distributed_training.batch())
    reports = [json.loads(printed.splitlines()[-1]) for printed, _ in finished]
    means = torch.tensor([report["losses"] for report in reports], dtype=torch.float64).mean(0)
    torch.testing.assert_close(means, torch.tensor(losses, dtype=torch.float64))
    for report in reports:
        for name, tensor in ens.state_dict().items():
            got = torch.tensor(report["state"][name], dtype=tensor.dtype)
            torch.testing.assert_close(got, tensor)


# Hooks


class Seen:
    """Hooks that note the shapes that they see; the members share one."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __deepcopy__(self, memo: Any) -> Seen:
        return self

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self.shapes.append(tuple(args[0].shape))
        return (args[0] * 2,)

    def after(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.shapes.append(tuple(output.shape))
        return output + 1

    def backward(self, module: nn.Module, into: Any, out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(None if gradient is None else gradient * 3 for gradient in into)


@strategies
def test_forward_hooks_of_the_members(strategy: str) -> None:
    seen, models = Seen(), [mlp() for _ in range(3)]
    for model in models:
        model[0].register_forward_pre_hook(seen.before)
        model[2].register_forward_hook(seen.after)
    assert_same_gradients(Ensemble(models, strategy=strategy), models)
    assert set(seen.shapes) == {(5, 3), (5, 2)}  # what a member sees, not the stack


def test_hooks_of_the_ensemble_and_of_its_parameters() -> None:
    seen, (ens, models) = Seen(), make()
    gradients: list[Tensor] = []
    ens.register_forward_pre_hook(seen.before)
    ens.register_forward_hook(seen.after)
    ens.members[0].weight.register_hook(gradients.append)
    ens.members[0].weight.register_post_accumulate_grad_hook(lambda p: gradients.append(p.grad))
    oracles.assert_outputs_equal(ens(X), [model(2 * X) + 1 for model in models])
    ens(X).sum().backward()
    assert seen.shapes[:2] == [(5, 3), (3, 5, 2)]
    assert [tuple(gradient.shape) for gradient in gradients] == [(3, 4, 3)] * 2


def test_a_backward_hook_of_the_ensemble() -> None:
    seen, (ens, models) = Seen(), make()
    ens.register_full_backward_hook(seen.backward)
    x = X.clone().requires_grad_()
    ens(x).square().sum().backward()
    mine, x.grad = x.grad, None
    sum(model(x).square().sum() for model in models).backward()
    torch.testing.assert_close(mine, 3 * x.grad)


def with_backward_hook() -> nn.Module:
    model = mlp()
    model[2].register_full_backward_hook(HOOKS.backward)
    return model


HOOKS = Seen()


@pytest.mark.parametrize("strategy", ["auto", "loop"])
def test_backward_hooks_of_the_members(strategy: str) -> None:
    ens, models = make(with_backward_hook, strategy=strategy)
    warns = pytest.warns(EnsembleWarning, match="`2` has a backward hook")
    with warns if strategy == "auto" else nullcontext():
        ens(X)
    assert_same_gradients(ens, models)


@pytest.mark.parametrize("strategy", ["fused", "vmap"])
def test_backward_hooks_are_never_passed_over(strategy: str) -> None:
    ens, models = make(with_backward_hook, strategy=strategy)
    with pytest.raises(RuntimeError, match="`2` has a backward hook"):
        ens(X)
    with torch.no_grad():  # there is no backward
        oracles.assert_outputs_equal(ens(X), [model(X) for model in models])


# Modes of torch


@strategies
def test_inference_mode_and_then_training(strategy: str) -> None:
    ens, models = make(normed, strategy=strategy)
    with torch.inference_mode():
        outputs = ens(X)
        oracles.assert_outputs_equal(outputs, [model(X) for model in models])
    assert outputs.is_inference()
    oracles.assert_state_equal(ens, models)
    assert_same_gradients(ens, models)
    with torch.inference_mode():
        oracles.assert_outputs_equal(ens(X), [model(X) for model in models])
    assert not any(tensor.is_inference() for tensor in ens.state_dict().values())


@strategies
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_misplaces_nothing(strategy: str, device: str) -> None:
    models = [normed() for _ in range(3)]
    xs = torch.stack([X, 2 * X, 3 * X])
    with torch.device(device):
        ens = Ensemble(models, strategy=strategy)
        outputs = ens(X)
        own = ens(per_member(xs))
        parts = Ensemble(models, strategy=strategy, chunk_size=2, randomness="same")(X)
        ens[1:](X)
    assert {tensor.device.type for tensor in (outputs, own, parts)} == {"cpu"}
    oracles.assert_outputs_equal(outputs, [model(X) for model in copy.deepcopy(models)])
    assert {tensor.device.type for tensor in ens.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_set_default_device(device: str) -> None:
    models = [mlp() for _ in range(3)]
    torch.set_default_device(device)
    try:
        outputs = Ensemble(models)(X)
    finally:
        torch.set_default_device(None)
    oracles.assert_outputs_equal(outputs, [model(X) for model in models])


@strategies
def test_an_ensemble_on_the_meta_device(strategy: str) -> None:
    ens, _ = make(strategy=strategy)
    outputs = ens.to("meta")(X.to("meta"))
    assert outputs.device.type == "meta"
    assert outputs.shape == (3, 5, 2)


@strategies
@torch.no_grad()
def test_fake_tensors(strategy: str) -> None:
    with FakeTensorMode():
        ens = Ensemble([nn.Linear(3, 2) for _ in range(3)], strategy=strategy)
        for _ in range(2):
            outputs = ens(torch.randn(5, 3))
    assert outputs.shape == (3, 5, 2)


@strategies
def test_deterministic_algorithms(strategy: str) -> None:
    ens, models = make(strategy=strategy)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same_gradients(ens, models)
        again = make(strategy=strategy)[0]
        again.load_state_dict(ens.state_dict())
        assert torch.equal(again(X), ens(X))
    finally:
        torch.use_deterministic_algorithms(False)


# Copies after a call


@strategies
@pytest.mark.parametrize("how", [copy.deepcopy, lambda ens: pickle.loads(pickle.dumps(ens))])
def test_a_copy_after_a_call_is_one_of_its_own(strategy: str, how: Any) -> None:
    ens, models = make(normed, strategy=strategy)
    ens(X)
    other = how(ens)
    other.eval()
    assert ens.training
    other(X).sum().backward()
    assert all(parameter.grad is None for parameter in ens.parameters())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    for model in models:
        model(X)
    assert_same_gradients(ens, models)


@pytest.mark.parametrize(
    "mode", [nullcontext, torch.no_grad, torch.inference_mode], ids=["grad", "no_grad", "inference"]
)
def test_modes_may_follow_one_another(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    ens, models = make(normed)
    for around in (mode, nullcontext, torch.no_grad, torch.inference_mode, mode):
        with around():
            oracles.assert_outputs_equal(ens(X), [model(X) for model in models])
    oracles.assert_state_equal(ens, models)
