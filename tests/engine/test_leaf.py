"""nn.Linear in a template calls its rule directly, and only where nobody could notice."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from unisono import Ensemble, per_member
from unisono.engine import leaf


class Subclass(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def with_own_forward() -> nn.Module:
    linear = nn.Linear(4, 3)
    linear.forward = F.relu  # type: ignore[method-assign]
    return linear


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How linear layers run: by the rule at once, or through F.linear."""
    taken: list[str] = []
    rule, function = leaf.linear, F.linear

    def by_rule(*args: object) -> object:
        taken.append("rule")
        return rule(*args)  # type: ignore[arg-type]

    def by_function(*args: object) -> object:
        taken.append("function")
        return function(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(leaf, "linear", by_rule)
    monkeypatch.setattr(F, "linear", by_function)
    return taken


X = torch.randn(5, 4)


def test_fused_takes_the_short_way(ways: list[str]) -> None:
    models = [nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2, bias=False)) for _ in range(3)]
    ens = Ensemble(models, strategy="fused")
    outputs = ens(X)
    assert ways == ["rule", "rule"]
    torch.testing.assert_close(outputs, torch.stack([model(X) for model in models]))


@pytest.mark.parametrize("strategy", ["vmap", "loop"])
def test_other_strategies_do_not(ways: list[str], strategy: str) -> None:
    Ensemble([nn.Linear(4, 3) for _ in range(3)], strategy=strategy)(X)  # type: ignore[arg-type]
    assert set(ways) == {"function"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Subclass(4, 3),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
        lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
        with_own_forward,
    ],
    ids=["subclass", "parametrization", "weight from a hook", "own forward"],
)
def test_what_is_no_plain_linear_layer_does_not(
    ways: list[str], make: Callable[[], nn.Module]
) -> None:
    models = [make().eval() for _ in range(3)]
    outputs = Ensemble(models, strategy="fused")(X)
    assert "rule" not in ways
    torch.testing.assert_close(outputs, torch.stack([model(X) for model in models]))


class Listening(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.heard.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_mode_hears_of_every_layer() -> None:
    ens = Ensemble([nn.Linear(4, 3) for _ in range(3)], strategy="fused")
    with Listening() as mode:
        ens(X)
    assert "linear" in mode.heard


def test_hooks_see_what_they_always_see() -> None:
    seen: list[tuple[torch.Size, torch.Size]] = []
    models = [nn.Linear(4, 3) for _ in range(3)]
    for model in models:
        model.register_forward_hook(note)
    note.seen = seen  # type: ignore[attr-defined]
    Ensemble(models, strategy="fused")(X)
    assert seen == [((5, 4), (5, 3))]


def note(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    note.seen.append((args[0].shape, output.shape))  # type: ignore[attr-defined]


def test_inside_a_transform_of_the_member_itself() -> None:
    ens = Ensemble([nn.Linear(4, 3).double() for _ in range(3)], strategy="fused")
    x = torch.randn(3, 5, 4, dtype=torch.float64)

    def jacobian(member: nn.Module, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(member))(x)

    expected = torch.stack([jacobian(member, x[i]) for i, member in enumerate(ens)])
    torch.testing.assert_close(ens.run(jacobian, per_member(x)), expected)


def test_members_taken_out_are_ordinary_modules() -> None:
    ens = Ensemble([nn.Linear(4, 3) for _ in range(3)], strategy="fused")
    ens(X)
    for member in (ens[0], ens.unstack()[0]):
        assert "forward" not in vars(member)


# Chains of layers


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*copy.deepcopy(layers)).double()


CHAINS = {
    "linear and activations": chain(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2), nn.Sigmoid()
    ),
    "activations behind each other": chain(
        nn.Linear(4, 6), nn.ReLU(), nn.Tanh(), nn.Linear(6, 2), nn.Sigmoid(), nn.ReLU()
    ),
    "an activation first": chain(nn.ReLU(), nn.Linear(4, 2)),
    "activations only": chain(nn.Tanh(), nn.ReLU()),
    "other layers between": chain(
        nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2)
    ),
    "in each other": chain(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 2)),
    "in place by itself": chain(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per member"])
def test_a_chain_equals_the_loop(name: str, shared: bool) -> None:
    models = [CHAINS[name]() for _ in range(3)]
    for model in models:
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    ens = Ensemble(models, strategy="fused")
    xs = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    given = xs[0].detach().clone().requires_grad_() if shared else xs
    outputs = ens(given if shared else per_member(given))
    expected = torch.stack([m(given if shared else given[i]) for i, m in enumerate(models)])
    torch.testing.assert_close(outputs, expected)
    weights = torch.randn_like(expected)
    (mine,) = torch.autograd.grad(outputs, given, weights, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, given, weights, retain_graph=True)
    torch.testing.assert_close(mine, theirs)
    if list(ens.parameters()):
        (outputs * weights).sum().backward()
        (expected * weights).sum().backward()
        oracles.assert_gradients_equal(ens, models)


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
def test_activations_between_layers_are_in_place(grad: bool) -> None:
    models = [CHAINS["linear and activations"]() for _ in range(3)]
    ens = Ensemble(models, strategy="fused")
    with torch.set_grad_enabled(grad), Recording() as mode:
        ens(X.double())
    assert [op for op in mode.ops if op in ("relu_", "tanh_", "sigmoid_")] == [
        "relu_", "tanh_", "sigmoid_"
    ]  # fmt: skip
    assert not {"relu", "tanh", "sigmoid"} & set(mode.ops)


def test_the_input_is_never_written_to() -> None:
    models = [CHAINS["an activation first"]() for _ in range(3)]
    xs = torch.randn(3, 5, 4, dtype=torch.float64)
    before = xs.clone()
    Ensemble(models, strategy="fused")(per_member(xs))
    assert torch.equal(xs, before)


def test_a_hook_on_a_layer_sees_what_the_layer_returned() -> None:
    models = [CHAINS["linear and activations"]() for _ in range(3)]
    seen: list[Tensor] = []
    note.seen = []  # type: ignore[attr-defined]
    for model in models:
        model[0].register_forward_hook(keep)  # type: ignore[index]
    keep.seen = seen  # type: ignore[attr-defined]
    outputs = Ensemble(models, strategy="fused").run(hidden, X.double())
    expected = torch.stack([model[0](X.double()) for model in models])  # type: ignore[index]
    torch.testing.assert_close(outputs, expected)


def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    keep.seen.append(output)  # type: ignore[attr-defined]


def hidden(member: nn.Module, x: Tensor) -> Tensor:
    keep.seen.clear()  # type: ignore[attr-defined]
    member(x)
    return keep.seen[0]  # type: ignore[attr-defined, no-any-return]


def test_an_error_names_the_layer() -> None:
    ens = Ensemble([nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(5, 2)) for _ in range(3)])
    ens.strategy = "fused"
    with pytest.raises(RuntimeError, match="Expected size") as info:
        ens(X)
    assert "raised in `2` (Linear)" in info.value.__notes__[0]


def test_hooks_for_every_module_of_the_process_are_run() -> None:
    ens = Ensemble([CHAINS["linear and activations"]() for _ in range(3)], strategy="fused")
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(type(module).__name__)
    )
    try:
        ens(X.double())
    finally:
        handle.remove()
    assert called[:3] == ["Linear", "ReLU", "Linear"]
