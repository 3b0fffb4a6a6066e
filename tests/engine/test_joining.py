"""Gradients of members that run one by one: joined where the last ones were, never where one is."""

from __future__ import annotations

import copy
import pickle
from typing import Any, ClassVar

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn

import oracles
from cases import CASES, Case, N, members
from unisono import Ensemble
from unisono.engine import joining
from unisono.engine.axis import is_unheld
from unisono.engine.tree import tree_map


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_SMALLEST", 0)


def make() -> Ensemble:
    return Ensemble([nn.Linear(3, 2).double() for _ in range(4)], strategy="loop")


def member_of(outputs: Any, i: int) -> Any:
    return tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, outputs)


def step(ens: Ensemble, x: Tensor) -> Tensor:
    """The gradient of the weights, after those before were dropped."""
    ens.zero_grad()
    ens(x).square().sum().backward()
    gradient = ens.members.weight.grad
    assert isinstance(gradient, Tensor)
    return gradient


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_the_loop_in_each_step(case: Case) -> None:
    if case.random_in_training:
        pytest.skip("draws random numbers: equal in distribution only, see test_engine.py")
    models = [model.train() for model in members(case, N)]
    ens = Ensemble(models, strategy="loop")
    if not any(p.requires_grad for p in ens.parameters()):
        pytest.skip("nothing to train")
    for _ in range(3):
        ens.zero_grad()
        for model in models:
            model.zero_grad()
        args, kwargs = case.inputs()
        outputs = ens(*args, **kwargs)
        sum(oracles.total(member_of(outputs, i)) for i in range(N)).backward()
        expected = oracles.loop_outputs(models, [(args, kwargs)] * N)
        sum(oracles.total(output) for output in expected).backward()
        oracles.assert_gradients_equal(ens, models, **oracles.TOLERANCES.get(case.dtype, {}))


def test_memory_that_nobody_has_is_used_again() -> None:
    ens = make()
    places = {step(ens, torch.randn(5, 3, dtype=torch.float64)).data_ptr() for _ in range(5)}
    assert len(places) == 1
    assert set(ens._planner.pool.rooms) == {"weight", "bias"}


@pytest.mark.parametrize(
    "hold",
    [
        lambda gradient: gradient,
        lambda gradient: gradient[1],
        lambda gradient: gradient.detach().numpy(),
        lambda gradient: gradient.untyped_storage(),
        lambda gradient: torch.utils.dlpack.to_dlpack(gradient),
    ],
    ids=["tensor", "view", "array", "storage", "capsule"],
)
def test_memory_that_somebody_has_is_left_alone(hold) -> None:
    ens = make()
    first = step(ens, torch.ones(5, 3, dtype=torch.float64))
    place, kept, before = first.data_ptr(), hold(first), first.clone()
    ens.zero_grad()
    if isinstance(kept, Tensor) and kept.shape == first.shape:
        watched = kept
    else:
        watched = before
    del first
    for _ in range(3):
        assert step(ens, torch.randn(5, 3, dtype=torch.float64)).data_ptr() != place
    assert torch.equal(watched, before)
    del kept, watched


def test_gradients_add_up() -> None:
    ens, x = make(), torch.randn(5, 3, dtype=torch.float64)
    once = step(ens, x).clone()
    for _ in range(2):
        ens(x).square().sum().backward()
    torch.testing.assert_close(ens.members.weight.grad, 3 * once)


def test_members_that_have_no_part_in_the_loss() -> None:
    ens = make()
    step(ens, torch.ones(5, 3, dtype=torch.float64))  # so that there is something in the memory
    ens.zero_grad()
    ens(torch.ones(5, 3, dtype=torch.float64))[1].sum().backward()
    gradient = ens.members.weight.grad
    assert gradient is not None
    assert gradient.flatten(1).abs().sum(1).ne(0).tolist() == [False, True, False, False]


class Skips(nn.Module):
    """A layer that is left out where a buffer says so."""

    def __init__(self, is_left_out: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3).double()
        self.register_buffer("is_left_out", torch.tensor(is_left_out))

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.is_left_out else self.fc(x)


def test_members_that_leave_a_layer_out_have_no_gradient_in_it() -> None:
    ens = Ensemble([Skips(False) for _ in range(3)], strategy="loop")
    x = torch.ones(5, 3, dtype=torch.float64)
    ens(x).sum().backward()  # so that there is something in the memory
    ens.zero_grad()
    with torch.no_grad():
        ens.members.is_left_out[1] = True
    ens(x).sum().backward()
    gradient = ens.members.get_parameter("fc.weight").grad
    assert isinstance(gradient, Tensor)
    assert [bool(row.any()) for row in gradient] == [True, False, True]


def test_gradients_arrive_in_the_order_of_the_parameter() -> None:
    models = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(3)]
    ens = Ensemble(models, strategy="loop")
    ens(torch.randn(2, 3, 5, 5)).sum().backward()
    weight = ens.members.weight
    assert isinstance(weight.grad, Tensor)
    assert weight.grad.stride() == weight.stride()
    assert not weight.is_contiguous()


def test_the_gradient_of_a_gradient() -> None:
    ens, x = make(), torch.randn(5, 3, dtype=torch.float64)
    found = []
    for strategy in ("loop", "fused"):
        ens.strategy = strategy
        (first,) = torch.autograd.grad(
            ens(x).tanh().square().sum(), ens.members.weight, create_graph=True
        )
        found.append(torch.autograd.grad(first.square().sum(), ens.members.weight)[0])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # torch's own use
def test_forward_mode() -> None:
    ens, x = make(), torch.randn(5, 3, dtype=torch.float64)
    weight = ens.members.weight
    tangent = torch.randn_like(weight)
    with fwad.dual_level():
        dual = {"members.weight": fwad.make_dual(weight.detach().requires_grad_(), tangent)}
        found = fwad.unpack_dual(torch.func.functional_call(ens, dual, (x,))).tangent
    assert found is not None
    torch.testing.assert_close(found, x @ tangent.mT)


def test_it_is_let_go_when_training_is_over() -> None:
    ens, x = make(), torch.ones(5, 3, dtype=torch.float64)
    step(ens, x)
    rooms = ens._planner.pool.rooms
    for other in (copy.deepcopy(ens), pickle.loads(pickle.dumps(ens))):
        assert not other._planner.pool.rooms
    with torch.no_grad():
        ens(x)
    assert rooms, "in train mode it may be a target network's turn"
    ens.eval()
    ens(x)
    assert rooms, "gradients may follow"
    with torch.no_grad():
        ens(x)
    assert not rooms


def test_small_parameters_and_other_devices_are_left_to_torch(monkeypatch) -> None:
    monkeypatch.setattr(joining, "_SMALLEST", 1 << 20)
    ens = make()
    step(ens, torch.ones(5, 3, dtype=torch.float64))
    assert not ens._planner.pool.rooms
    monkeypatch.setattr(joining, "_SMALLEST", 0)
    weight = torch.empty(4, 2, 3, device="meta", requires_grad=True)
    joining.members_of(weight, "weight", ens._planner.pool.rooms)[0].sum().backward()
    assert not ens._planner.pool.rooms


def test_threads_never_write_to_one_memory() -> None:
    ens = make()
    xs = [torch.randn(5, 3, dtype=torch.float64) for _ in range(8)]
    wanted = [torch.autograd.grad(ens(x).square().sum(), ens.members.weight)[0] for x in xs]
    wrong = []

    def work(k: int) -> None:
        for _ in range(50):
            found = torch.autograd.grad(ens(xs[k]).square().sum(), ens.members.weight)[0]
            if not torch.allclose(found, wanted[k]):
                wrong.append(k)

    oracles.in_threads(work, 8)
    assert not wrong


class Looks(nn.Module):
    """Rows of a table with sparse gradients, or the whole table where a buffer says so."""

    def __init__(self, is_whole: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 3, sparse=True).double()
        self.register_buffer("is_whole", torch.tensor(is_whole))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table.weight.square().sum() if self.is_whole else self.table(ids).square().sum()


@pytest.mark.parametrize("whole", [(), (1,), (0, 1, 2)], ids=["none", "one", "all"])
def test_sparse_gradients(whole: tuple[int, ...]) -> None:
    models = [Looks(i in whole) for i in range(3)]
    ens = Ensemble(models, strategy="loop")
    ids = torch.tensor([0, 4, 4])
    ens(ids).sum().backward()
    gradient = ens.members.get_parameter("table.weight").grad
    assert isinstance(gradient, Tensor)
    assert gradient.is_sparse == (not whole)
    for own, model in zip(gradient.to_dense(), models, strict=True):
        model(ids).backward()
        assert model.table.weight.grad is not None
        torch.testing.assert_close(own, model.table.weight.grad.to_dense())


class Told(nn.Module):
    """Says when the backward of a member begins."""

    events: ClassVar[list[tuple[str, int]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2).double()
        self.register_buffer("number", torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        number = int(self.number)
        y.register_hook(lambda _: Told.events.append(("backward", number)))
        return y


def test_a_gradient_is_copied_as_soon_as_its_member_is_done(monkeypatch) -> None:
    models = [Told() for _ in range(3)]
    monkeypatch.setattr(Told, "events", events := [])
    for i, model in enumerate(models):
        model.number.fill_(i)
    write = joining._Joint.write

    def told(joint: Any, i: int, gradient: Tensor | None) -> Tensor:
        place = write(joint, i, gradient)
        if gradient is not None and gradient.data_ptr() != place.data_ptr():
            events.append(("copy", i))
        return place

    monkeypatch.setattr(joining._Joint, "write", told)
    Ensemble(models, strategy="loop")(torch.ones(5, 3).double()).sum().backward()
    # Of weight and bias, and none a second time when all are done.
    assert events == [(what, i) for i in (2, 1, 0) for what in ("backward", "copy", "copy")]


def test_threads_may_go_back_through_one_call() -> None:
    ens = make()
    outputs = ens(torch.randn(5, 3, dtype=torch.float64))
    factors = [torch.randn_like(outputs) for _ in range(8)]

    def gradient(k: int) -> Tensor:
        total = (outputs * factors[k]).sum()
        return torch.autograd.grad(total, ens.members.weight, retain_graph=True)[0]

    wanted = [gradient(k) for k in range(8)]
    wrong = []

    def work(k: int) -> None:
        wrong.extend(k for _ in range(50) if not torch.equal(gradient(k), wanted[k]))

    oracles.in_threads(work, 8)
    assert not wrong


def test_a_pass_after_one_that_was_broken_off() -> None:
    ens = make()
    outputs = ens(torch.randn(5, 3, dtype=torch.float64))
    wanted = torch.autograd.grad(outputs[:2].sum(), ens.members.weight, retain_graph=True)[0]

    def refuse(gradient: Tensor) -> None:
        raise RuntimeError("not this one")

    rows = outputs * torch.ones_like(outputs).cumsum(0)
    first = rows[0] * 1  # goes back last, when the other members are done
    handle = first.register_hook(refuse)
    with pytest.raises(RuntimeError, match="not this one"):
        torch.autograd.grad(first.sum() + rows[1:].sum(), ens.members.weight, retain_graph=True)
    handle.remove()
    found = torch.autograd.grad(outputs[:2].sum(), ens.members.weight)[0]
    torch.testing.assert_close(found, wanted)
    assert not found[2:].any()


def test_memory_is_somebodys_before_another_thread_can_find_it() -> None:
    """Two statements the other way round, and a thread between them would write to a gradient."""
    unheld = []

    class Watched(dict[str, Tensor]):
        def __setitem__(self, name: str, room: Tensor) -> None:
            unheld.append(is_unheld(room))
            super().__setitem__(name, room)

    ens = make()
    ens._planner.pool.rooms = Watched()
    step(ens, torch.ones(5, 3, dtype=torch.float64))
    assert unheld == [False, False]


def test_who_holds_memory() -> None:
    room = torch.empty(2, 3)
    assert is_unheld(room)
    held = room[0]
    assert not is_unheld(room)
    del held
    assert is_unheld(room)
