"""The physical order of parameters: another one where it is faster, and never seen otherwise."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from unisono import Ensemble
from unisono.engine.planning.plan import MemoryFormat
from unisono.engine.planning.storage import adopt, current_format, in_format, is_free
from unisono.engine.template import Template


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(2 * 4, 3)
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


MAKES = [(conv_net, "channels_last", (2, 1, 5, 5)), (mlp, "transposed", (6, 4))]
each = pytest.mark.parametrize(("make", "memory_format", "shape"), MAKES, ids=["conv", "mlp"])


def template_of(ens: Ensemble) -> Template:
    return ens._planner.pool.take()


def make_pair(make: object, memory_format: MemoryFormat) -> tuple[Ensemble, Ensemble]:
    """The same ensemble twice, the second one stored in the format."""
    models = [make().double() for _ in range(3)]  # type: ignore[operator]
    plain, stored = (Ensemble(models, strategy="fused") for _ in range(2))
    adopt(template_of(stored), memory_format)
    return plain, stored


@each
@pytest.mark.parametrize("strategy", ["fused", "vmap", "loop"])
def test_shapes_names_values_and_results_stay(
    make: object, memory_format: MemoryFormat, shape: tuple[int, ...], strategy: str
) -> None:
    plain, stored = make_pair(make, memory_format)
    plain.strategy = stored.strategy = strategy
    assert current_format(template_of(stored)) == memory_format
    for (name, a), (other, b) in zip(
        plain.state_dict().items(), stored.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)
    x = torch.randn(*shape, dtype=torch.float64)
    for ens in (plain, stored):
        ens(x).square().sum().backward()
    torch.testing.assert_close(stored(x), plain(x))
    for a, b in zip(plain.parameters(), stored.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad)


def test_strides_are_those_that_torch_gives_to_one_member() -> None:
    _, stored = make_pair(conv_net, "channels_last")
    member = conv_net().to(memory_format=torch.channels_last)
    for index in (0, 2):
        weight = stored.members.get_parameter(f"{index}.weight")
        assert weight[1].stride() == member[index].weight.stride()  # type: ignore[union-attr]
    _, stored = make_pair(mlp, "transposed")
    weight = stored.members.get_parameter("0.weight")
    assert weight.mT.is_contiguous()


@each
def test_the_gradient_arrives_in_the_order_of_the_parameter(
    make: object, memory_format: MemoryFormat, shape: tuple[int, ...]
) -> None:
    _, stored = make_pair(make, memory_format)
    stored(torch.randn(shape, dtype=torch.float64)).sum().backward()
    for parameter in stored.parameters():
        assert parameter.grad is not None
        if 1 not in parameter.shape:  # the stride of an axis of length 1 says nothing
            assert parameter.grad.stride() == parameter.stride()


@each
def test_parameters_stay_the_same_objects(
    make: object, memory_format: MemoryFormat, shape: tuple[int, ...]
) -> None:
    ens = Ensemble([make() for _ in range(3)])  # type: ignore[operator]
    before = list(ens.parameters())
    adopt(template_of(ens), memory_format)
    assert all(a is b for a, b in zip(before, ens.parameters(), strict=True))
    assert all(p.is_leaf and p.requires_grad for p in ens.parameters())


def test_adopted_in_inference_mode_they_can_still_be_trained() -> None:
    ens = Ensemble([mlp() for _ in range(3)], strategy="fused")
    with torch.inference_mode():
        adopt(template_of(ens), "transposed")
    ens(torch.randn(5, 4)).sum().backward()
    assert all(p.grad is not None for p in ens.parameters())


def test_copies_and_checkpoints_don_t_show_it() -> None:
    plain, stored = make_pair(mlp, "transposed")
    buffer = io.BytesIO()
    torch.save(stored.state_dict(), buffer)
    buffer.seek(0)
    plain.load_state_dict(torch.load(buffer))
    x = torch.randn(5, 4, dtype=torch.float64)
    for other in (plain, copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        torch.testing.assert_close(other(x), stored(x))
    for member, other in zip(stored.unstack(), stored, strict=True):
        torch.testing.assert_close(member(x), other(x))


# A fused optimizer reads parameters and moments by address


def train(ens: Ensemble, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = ens(torch.ones(5, 4)).square().mean((1, 2)).sum()
    loss.backward()
    optimizer.step()
    return loss


def test_the_order_stays_while_there_is_a_gradient_or_an_optimizer_state() -> None:
    ens = Ensemble([mlp() for _ in range(3)], strategy="fused")
    assert is_free(template_of(ens), "transposed")
    optimizer = torch.optim.Adam(ens.parameters(), fused=True)
    assert is_free(template_of(ens), "transposed")  # it has no state before its first step
    ens(torch.ones(5, 4)).sum().backward()
    assert not is_free(template_of(ens), "transposed")
    optimizer.step()
    ens.zero_grad()
    assert not is_free(template_of(ens), "transposed")
    optimizer.state.clear()
    assert is_free(template_of(ens), "transposed")


def test_the_state_of_an_optimizer_that_was_loaded_decides() -> None:
    models = [mlp() for _ in range(3)]

    def train_on(ens: Ensemble, state: dict[str, object] | None) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(ens.parameters(), lr=0.1, fused=True)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        for _ in range(3):
            train(ens, optimizer)
        return optimizer

    first = Ensemble(models)
    adopt(template_of(first), "transposed")
    state = train_on(first, None).state_dict()
    resumed = Ensemble(models)
    resumed.load_state_dict(first.state_dict())
    assert resumed.members.get_parameter("0.weight").is_contiguous()
    train_on(resumed, state)  # loads before the first call
    train_on(first, state)
    assert current_format(template_of(resumed)) == "transposed"
    for a, b in zip(first.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_an_ensemble_is_freed_when_it_is_deleted() -> None:
    ens = Ensemble([mlp() for _ in range(3)])
    parameters = [weakref.ref(parameter) for parameter in ens.parameters()]
    gc.disable()
    try:
        del ens
        assert [parameter() for parameter in parameters] == [None] * 4
    finally:
        gc.enable()


@pytest.mark.parametrize("fused", [True, False])
def test_training_is_the_same_in_either_order(fused: bool) -> None:
    models = [mlp() for _ in range(3)]
    losses = []
    for memory_format in ("contiguous", "transposed"):
        ens = Ensemble(models, strategy="fused")
        if memory_format != "contiguous":
            adopt(template_of(ens), "transposed")
        optimizer = torch.optim.Adam(ens.parameters(), lr=0.1, fused=fused)
        losses.append(torch.stack([train(ens, optimizer).detach() for _ in range(5)]))
    torch.testing.assert_close(losses[0], losses[1])


def test_copies_in_a_format_leave_the_parameters_alone_and_tied_ones_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    ens = Ensemble([Tied() for _ in range(3)])
    template = template_of(ens)
    values = in_format(template, template.values(), "transposed")
    names = [slot.name for slot in template.slots]
    a, b = values[names.index("a.weight")], values[names.index("b.weight")]
    assert a is b
    assert a.mT.is_contiguous()
    assert ens.members.get_parameter("a.weight").is_contiguous()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "transposed"),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()), "channels_last"),
        (lambda: nn.LayerNorm(3), "contiguous"),
    ],
)
def test_stored_for_training_without_measuring(make, expected):
    ens = Ensemble([make() for _ in range(3)], strategy="fused")
    before = {name: p.detach().clone() for name, p in ens.members.named_parameters()}
    ens._planner.store_for_training()
    assert current_format(ens._planner.pool.take()) == expected
    for name, p in ens.members.named_parameters():
        assert torch.equal(p, before[name])


def test_what_training_has_begun_stays_as_it_is_stored():
    ens = Ensemble([nn.Linear(3, 4) for _ in range(3)], strategy="fused")
    ens(torch.ones(2, 3)).sum().backward()
    ens._planner.store_for_training()
    assert current_format(ens._planner.pool.take()) == "contiguous"


# Where there are process groups, a wrapper may have noted where a parameter is -------------------


@pytest.fixture
def in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)


@pytest.mark.usefixtures("in_a_group")
def test_the_order_is_free_in_a_group_only_if_nobody_else_holds_the_parameters() -> None:
    ens = Ensemble([mlp() for _ in range(3)], strategy="fused")
    assert not is_free(template_of(ens), "transposed")
    ens._planner.keep_private({})
    assert is_free(template_of(ens), "transposed")
    ens(torch.ones(5, 4)).sum().backward()
    assert not is_free(template_of(ens), "transposed")


@pytest.mark.usefixtures("in_a_group")
@pytest.mark.parametrize("fused", [True, False])
def test_the_state_of_a_private_optimizer_moves_along(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gc, "get_referrers", lambda *_: pytest.fail("looked at all objects"))
    models = [mlp() for _ in range(3)]
    losses = []
    for memory_format in ("contiguous", "transposed"):
        ens = Ensemble(models, strategy="fused")
        optimizer = torch.optim.Adam(ens.parameters(), lr=0.1, fused=fused)
        ens._planner.keep_private(optimizer.state)
        first = train(ens, optimizer)
        optimizer.zero_grad()
        assert is_free(template_of(ens), memory_format)
        adopt(template_of(ens), memory_format)
        weight = ens.members.get_parameter("0.weight")
        moments = [optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq")]
        assert {m.stride() for m in moments} == {weight.stride()}
        assert weight.is_contiguous() == (memory_format == "contiguous")
        rest = [train(ens, optimizer).detach() for _ in range(4)]
        losses.append(torch.stack([first.detach(), *rest]))
    torch.testing.assert_close(losses[0], losses[1])
