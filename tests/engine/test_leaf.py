"""nn.Linear in a template calls its rule directly, and only where nobody could notice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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
