"""Convolutions with weights of their own: one by one with one gradient, and as products."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracles
from unisono import Ensemble, per_member
from unisono.engine.rules import conv_pointwise, conv_separate

CONV = importlib.import_module("unisono.engine.rules.conv")  # there are functions
TRANSPOSE = importlib.import_module("unisono.engine.rules.conv_transpose")  # of these names
N, B = 3, 2


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any convolution counts as one with large weights."""
    for module in (CONV, TRANSPOSE):
        monkeypatch.setattr(module, "is_large", lambda *args: True)
    monkeypatch.setattr(conv_separate, "_SMALLEST", 0)


def build(make: Callable[[], nn.Module]) -> tuple[Ensemble, list[nn.Module]]:
    torch.manual_seed(0)
    models = [make().double() for _ in range(N)]
    return Ensemble(models, strategy="fused"), models


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check_equal(ens: Ensemble, models: list[nn.Module], x: Tensor) -> None:
    """Outputs and gradients, of the input too, are those of the loop."""
    given = x.clone().requires_grad_()
    ens.zero_grad()
    found = ens(per_member(given))
    own = [x[i].clone().requires_grad_() for i in range(N)]
    for model in models:
        model.zero_grad()
    wanted = [model(each) for model, each in zip(models, own, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted))
    found.square().sum().backward()
    torch.stack([each.square().sum() for each in wanted]).sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad, torch.stack([each.grad for each in own]))  # type: ignore[misc]
    for name, parameter in ens.members.named_parameters():
        gradients = [model.get_parameter(name).grad for model in models]
        torch.testing.assert_close(parameter.grad, torch.stack(gradients))  # type: ignore[arg-type]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "transposed, with a margin of a position": (
        lambda: nn.ConvTranspose2d(3, 4, 3, dilation=2, output_padding=1),
        (3, 4, 5),
    ),
    "plain": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 5)),
    "without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 6, 5)),
    "padded": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 4, 4)),
    "padded on two sides": (lambda: nn.Conv2d(3, 4, (3, 2), padding=(1, 0)), (3, 4, 4)),
    "strides that leave a margin": (lambda: nn.Conv2d(3, 4, 3, (2, 3), 1), (3, 6, 7)),
    "dilated": (lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=(2, 1)), (3, 6, 5)),
    "same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (3, 6, 5)),
    "a line": (lambda: nn.Conv1d(3, 4, 3, 2, padding=1), (3, 7)),
    "a volume": (lambda: nn.Conv3d(3, 4, (2, 3, 2), padding=(1, 0, 1)), (3, 3, 4, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2, 2), (3, 3, 2)),
    "transposed, overlapping": (lambda: nn.ConvTranspose2d(3, 4, 3, 2, 1), (3, 3, 4)),
    "transposed, with a margin": (
        lambda: nn.ConvTranspose2d(3, 4, 3, (2, 1), 1, (1, 0), bias=False),
        (3, 3, 4),
    ),
    "transposed, dilated": (lambda: nn.ConvTranspose1d(3, 4, 3, 3, dilation=2), (3, 5)),
}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("heavy", [False, True], ids=["", "heavy"])
@pytest.mark.parametrize("few", [False, True], ids=["many positions", "few positions"])
@pytest.mark.parametrize("name", LAYERS)
def test_one_by_one_equals_the_loop(
    name: str, few: bool, heavy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv_separate, "_FEW", 1000 if few else 0)
    monkeypatch.setattr(conv_separate, "_HEAVY", 0 if heavy else 1 << 30)
    products: list[str] = []
    for place in ("_as_product", "_write_products"):
        run = getattr(conv_separate, place)
        monkeypatch.setattr(
            conv_separate,
            place,
            lambda *args, place=place, run=run: (products.append(place), run(*args))[1],
        )
    make, shape = LAYERS[name]
    ens, models = build(make)
    check_equal(ens, models, drawn(N, B, *shape))
    forward = ["_as_product"] * (heavy and not name.startswith("transposed"))
    expected = [] if name == "same" or not few else [*forward, "_write_products"]
    assert products == expected
    products.clear()
    with torch.no_grad():
        x = drawn(N, B, *shape)
        torch.testing.assert_close(
            ens(per_member(x)), torch.stack([m(own) for m, own in zip(models, x, strict=True)])
        )
    assert products == ([] if name == "same" or not few else forward)


@pytest.mark.usefixtures("large")
def test_chains_of_them_with_what_lies_between() -> None:
    ens, models = build(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(5, 2, 2, 2)),
        )
    )
    for _ in range(3):
        check_equal(ens, models, drawn(N, B, 3, 8, 8))


class Twice(nn.Module):
    """Uses one weight twice, and gives another no gradient in one of the uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.tanh(self.conv(x)))
        result: Tensor = self.last(y) + self.last(y.detach()).detach()
        return result


@pytest.mark.usefixtures("large")
def test_a_weight_that_is_used_twice() -> None:
    ens, models = build(Twice)
    for _ in range(3):
        check_equal(ens, models, drawn(N, B, 3, 5, 5))


@pytest.mark.usefixtures("large")
def test_gradients_have_the_memory_of_those_before_unless_somebody_holds_them() -> None:
    ens, _ = build(lambda: nn.Conv2d(3, 4, 3))
    x = drawn(N, B, 3, 5, 5)

    def step() -> Tensor:
        ens.zero_grad()
        ens(per_member(x)).square().sum().backward()
        gradient = ens.members.weight.grad
        assert isinstance(gradient, Tensor)
        return gradient

    place = step().data_ptr()
    assert step().data_ptr() == place
    held = step()
    before = held.clone()
    assert step().data_ptr() != place
    assert torch.equal(held, before)
    ens.eval()
    with torch.no_grad():
        ens(per_member(x))
    assert not ens._planner.pool.rooms


@pytest.mark.usefixtures("large")
def test_gradients_add_up_in_place() -> None:
    ens, models = build(lambda: nn.Conv2d(3, 4, 3))
    xs = [drawn(N, B, 3, 5, 5) * k for k in (1, 2, 3)]
    for x in xs:
        ens(per_member(x)).sum().backward()
        for i, model in enumerate(models):
            model(x[i]).sum().backward()
    wanted = torch.stack([model.weight.grad for model in models])  # type: ignore[misc]
    torch.testing.assert_close(ens.members.weight.grad, wanted)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    ens, models = build(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 2)))
    names = ("weight", "bias") if frozen == "both" else (frozen,)
    for module in (ens.members, *models):
        for name in names:
            module.get_parameter(f"1.{name}").requires_grad_(False)
    x = drawn(N, B, 3, 5, 5)
    ens(per_member(x)).square().sum().backward()
    for i, model in enumerate(models):
        model(x[i]).square().sum().backward()
    for name, parameter in ens.members.named_parameters():
        gradients = [model.get_parameter(name).grad for model in models]
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, torch.stack(gradients))  # type: ignore[arg-type]
        else:
            assert parameter.grad is None


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["padded", "without bias", "transposed, overlapping"])
def test_gradients_of_gradients(name: str) -> None:
    make, shape = LAYERS[name]
    ens, models = build(make)

    def penalty(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(run(given).pow(3).sum(), given, create_graph=True)
        return gradient.square().sum()

    x = drawn(N, B, *shape)
    penalty(lambda given: ens(per_member(given)), x).backward()
    for i, model in enumerate(models):
        penalty(model, x[i]).backward()
    for key, parameter in ens.members.named_parameters():
        gradients = [model.get_parameter(key).grad for model in models]
        torch.testing.assert_close(parameter.grad, torch.stack(gradients))  # type: ignore[arg-type]


@pytest.mark.usefixtures("large")
def test_transforms_modes_and_casts_go_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ens, models = build(lambda: nn.Conv2d(3, 4, 3))
    x = drawn(N, B, 3, 5, 5)
    check_equal(ens, models, x)
    wanted = ens.members.weight.grad
    monkeypatch.setattr(
        conv_separate._Separate, "apply", lambda *args: pytest.fail("not for these")
    )
    state = dict(ens.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(ens, parameters, (per_member(x),))
        return found.square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(state)["members.weight"], wanted)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        ens(per_member(x)).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        single = Ensemble([model.float() for model in models], strategy="fused")
        assert single(per_member(x.float())).dtype is torch.bfloat16


@pytest.mark.usefixtures("large")
def test_threads_get_gradients_of_their_own() -> None:
    ens, _ = build(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 2)))
    xs = [drawn(N, B, 3, 5, 5) * k for k in range(1, 9)]
    weight = ens.members.get_parameter("0.weight")

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(ens(per_member(x)).square().sum(), weight)[0]

    wanted = [gradient(x) for x in xs]
    wrong = []

    def work(k: int) -> None:
        for _ in range(50):
            if not torch.allclose(gradient(xs[k]), wanted[k]):
                wrong.append(k)

    oracles.in_threads(work, 8)
    assert not wrong


# Filters of one position --------------------------------------------------------------------------

POINTWISE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(3, 4, 1), (3, 4, 5)),
    "without bias": (lambda: nn.Conv2d(3, 4, 1, bias=False), (3, 4, 5)),
    "strides": (lambda: nn.Conv2d(3, 4, 1, stride=(2, 3)), (3, 5, 7)),
    "same": (lambda: nn.Conv2d(3, 4, 1, padding="same"), (3, 4, 5)),
    "valid": (lambda: nn.Conv2d(3, 4, 1, padding="valid"), (3, 4, 5)),
    "dilated": (lambda: nn.Conv2d(3, 4, 1, dilation=2), (3, 4, 5)),
    "a line": (lambda: nn.Conv1d(3, 4, 1, stride=2), (3, 7)),
    "a volume": (lambda: nn.Conv3d(3, 4, 1), (3, 2, 3, 2)),
    "an empty minibatch": (lambda: nn.Conv2d(3, 4, 1), (3, 4, 5)),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_products_equal_the_loop(name: str) -> None:
    make, shape = POINTWISE[name]
    ens, models = build(make)
    x = drawn(N, 0 if name == "an empty minibatch" else B, *shape)
    check_equal(ens, models, x)
    with torch.no_grad():
        found = ens(per_member(x))
    torch.testing.assert_close(
        found, torch.stack([m(own) for m, own in zip(models, x, strict=True)]).detach()
    )


ELSEWHERE: dict[str, Callable[[], nn.Module]] = {
    "padded": lambda: nn.Conv2d(4, 4, 1, padding=1),
    "groups": lambda: nn.Conv2d(4, 4, 1, groups=2),
    "wider": lambda: nn.Conv2d(4, 4, (1, 2)),
}


@pytest.mark.parametrize("name", [*POINTWISE, *ELSEWHERE])
def test_products_are_for_single_positions_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    run = conv_pointwise.pointwise
    monkeypatch.setattr(CONV, "pointwise", lambda *args: (taken.append(run(*args)), taken[-1])[1])
    make = POINTWISE[name][0] if name in POINTWISE else ELSEWHERE[name]
    shape = POINTWISE[name][1] if name in POINTWISE else (4, 5, 5)
    ens, models = build(make)
    x = drawn(N, B, *shape)
    check_equal(ens, models, x)
    assert [found is not None for found in taken] == (
        [] if name == "groups" else [name in POINTWISE]
    )
    taken.clear()
    monkeypatch.setattr(conv_pointwise, "_MOST", 1)
    check_equal(ens, models, x)
    assert not any(found is not None for found in taken)


def test_a_large_minibatch_is_convolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_pointwise, "_MOST", B * 20 - 1)
    monkeypatch.setattr(torch, "bmm", lambda *args: pytest.fail("a product"))
    ens, models = build(lambda: nn.Conv2d(3, 4, 1, bias=False))
    check_equal(ens, models, drawn(N, B, 3, 4, 5))


@pytest.mark.parametrize("padding", [0, 1])
def test_a_capture_has_the_product_too(large: None, monkeypatch: Any, padding: int) -> None:
    monkeypatch.setattr(conv_separate, "_HEAVY", 0)
    ens, models = build(lambda: nn.Conv2d(3, 4, 3, padding=padding, dilation=2, stride=2))
    x = drawn(2, N, B, 3, 7, 7)
    with torch.no_grad():
        program = ens.capture(per_member(x[0]))
        assert "baddbmm" in program.code
        assert "convolution" not in program.code
        for model in models:
            model.weight.mul_(1.5)
        ens.members.weight.mul_(1.5)
        # This one lies behind the other in memory.
        wanted = [model(own) for model, own in zip(models, x[1], strict=True)]
        torch.testing.assert_close(program(per_member(x[1])), torch.stack(wanted))
