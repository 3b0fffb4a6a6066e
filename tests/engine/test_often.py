"""A call that comes often is replayed: only where that can't be told from the call itself."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from unisono import Ensemble, per_member
from unisono.engine import often

N, B = 3, 4


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(often, "OFTEN", 3)
    monkeypatch.setattr(often, "_LONGEST", 60.0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 2))


def cnn() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)


CHAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (5,)),
    "cnn": (cnn, (2, 8, 8)),
    "encoder": (encoder, (6, 8)),
    "flattened": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), (2, 3)),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(), nn.Tanh()), (5,)),
}


def often_called(ens: Ensemble, x: Any) -> Tensor:
    with torch.no_grad():
        for _ in range(3):
            found: Tensor = ens(x)
    return found


def replays(ens: Ensemble) -> int:
    return len(ens._planner._often._programs)


def by_loop(ens: Ensemble, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([member(x) for member in ens])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call, whether it was replayed."""
    found: list[bool] = []
    replayed = often.Often.replayed

    def noted(self: often.Often, call: Any) -> Any:
        outputs = replayed(self, call)
        found.append(outputs is not None)
        return outputs

    monkeypatch.setattr(often.Often, "replayed", noted)
    return found


@pytest.mark.parametrize("strategy", ["auto", "fused"])
@pytest.mark.parametrize("marked", [False, True], ids=["shared", "per member"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_replayed(name: str, marked: bool, strategy: Any, taken: list[bool]) -> None:
    make, shape = CHAINS[name]
    ens = Ensemble([make().double().eval() for _ in range(N)], strategy=strategy)
    x = torch.randn(N, B, *shape, dtype=torch.float64)
    given = per_member(x) if marked else x[0]
    before = often_called(ens, given)
    with torch.no_grad():
        after = ens(given)
        expected = torch.stack([m(x[i if marked else 0]) for i, m in enumerate(ens)])
        is_replayed = (taken[-1], replays(ens)) == (True, 1)
        plan = ens.explain(given)
    assert is_replayed == (plan.strategy == "fused" and plan.chunk_size is None)
    assert torch.equal(after, before)
    assert after.data_ptr() != before.data_ptr()
    torch.testing.assert_close(after, expected)


def fused(make: Callable[[], nn.Module] = mlp, **options: Any) -> Ensemble:
    return Ensemble([make().eval() for _ in range(N)], strategy="fused", **options)


def step(ens: Ensemble) -> None:
    optimizer = torch.optim.SGD(ens.parameters(), lr=0.5)
    ens(X).square().sum().backward()
    optimizer.step()


def swap(ens: Ensemble) -> None:
    for parameter in ens.parameters():
        parameter.data = parameter.data + 1


def load(ens: Ensemble) -> None:
    ens.load_state_dict({key: value + 1 for key, value in ens.state_dict().items()}, assign=True)


X = torch.randn(B, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("change", [step, swap, load, lambda ens: ens.copy_(0, 1)])
def test_weights_are_live(change: Callable[[Ensemble], None]) -> None:
    ens = fused()
    before = often_called(ens, X)
    assert replays(ens) == 1
    change(ens)
    with torch.no_grad():
        after = ens(X)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, by_loop(ens, X))


def test_statistics_are_live() -> None:
    ens = fused(cnn)
    x = torch.randn(B, 2, 8, 8)
    often_called(ens, x)
    ens.train()
    ens(x)
    ens.eval()
    with torch.no_grad():
        torch.testing.assert_close(ens(x), by_loop(ens, x))


def test_the_mode_counts(taken: list[bool]) -> None:
    ens = fused(lambda: nn.Sequential(nn.Linear(5, 64), nn.Dropout()))
    often_called(ens, X)
    ens.train()
    with torch.no_grad():
        assert (ens(X) == 0).any()
    assert not taken[-1]


@pytest.mark.parametrize(
    "other", [X[:2], X.double(), X.half(), torch.randn(5, B).T, torch.randn(2, 3, 5)]
)
def test_other_inputs_go_the_usual_way(other: Tensor, taken: list[bool]) -> None:
    ens = fused()
    often_called(ens, X)
    with torch.no_grad():
        if other.dtype != torch.float32:
            with pytest.raises(RuntimeError, match="dtype"):  # what the layers say
                ens(other)
        else:
            torch.testing.assert_close(ens(other), by_loop(ens, other))
    assert not taken[-1]


def test_with_gradients_or_casts_it_goes_the_usual_way(taken: list[bool]) -> None:
    ens = fused()
    often_called(ens, X)
    assert ens(X).requires_grad
    assert not taken[-1]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert ens(X).dtype == torch.bfloat16
    assert not taken[-1]
    with torch.inference_mode():
        assert ens(X).is_inference()
    assert taken[-1]


class Listening(TorchFunctionMode):
    heard = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.heard += 1
        return func(*args, **(kwargs or {}))


def test_who_listens_hears_everything(taken: list[bool]) -> None:
    ens = fused()
    often_called(ens, X)
    with torch.no_grad(), Listening() as mode:
        ens(X)
    assert mode.heard
    assert not taken[-1]
    seen: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        with torch.no_grad():
            ens(X)
    finally:
        hook.remove()
    assert any(isinstance(module, nn.ReLU) for module in seen)


def test_it_goes_as_it_was_asked_for() -> None:
    ens = fused()
    often_called(ens, X)
    with torch.no_grad():
        expected = ens(X)
        for strategy in ("loop", "vmap"):
            ens.strategy = strategy
            ens._planner._often.replayed = None  # type: ignore[assignment, method-assign]
            torch.testing.assert_close(ens(X), expected)
        ens.strategy, ens.chunk_size = "fused", 2
        torch.testing.assert_close(ens(X), expected)


class Own(nn.Module):
    """A forward that somebody wrote; it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = mlp()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) + self.calls


def test_a_forward_of_its_own_always_runs() -> None:
    ens = fused(Own)
    first = often_called(ens, X)
    with torch.no_grad():
        torch.testing.assert_close(ens(X), first + 1)
    assert replays(ens) == 0


def test_neither_in_train_mode_nor_in_chunks_nor_for_a_long_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for ens in (fused().train(), fused(chunk_size=2)):
        often_called(ens, X)
        assert replays(ens) == 0
    monkeypatch.setattr(often, "_LONGEST", 0.0)
    ens = fused()
    often_called(ens, X)
    assert replays(ens) == 0


def test_a_program_of_other_digits_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = often._recorded

    def another(*args: Any) -> Any:
        program = recorded(*args)
        assert program is not None
        return program._replace(replay=lambda x: program.replay(x) + 1e-7)

    monkeypatch.setattr(often, "_recorded", another)
    ens = fused()
    often_called(ens, X)
    assert replays(ens) == 0


def test_what_cant_be_recorded_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(often, "record", fails)
    ens = fused()
    torch.testing.assert_close(often_called(ens, X), by_loop(ens, X))
    assert replays(ens) == 0


def test_programs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(often, "_MOST", 4)
    ens = fused()
    with torch.no_grad():
        for size in (1, 2, 3, 4):
            while replays(ens) < size:
                ens(torch.randn(size, 5))
        for _ in range(200):
            ens(torch.randn(5, 5))
    assert replays(ens) == 4
    with torch.no_grad():
        for size in range(1, 12):
            x = torch.randn(size, 5)
            torch.testing.assert_close(ens(x), by_loop(ens, x))


@pytest.mark.parametrize("change", [lambda ens: ens.double(), swap])
def test_memory_that_was_left_is_freed(change: Callable[[Ensemble], Any]) -> None:
    ens = fused()
    often_called(ens, X)
    storages = [weakref.ref(p.untyped_storage()) for p in ens.parameters()]
    kept = [p.data_ptr() for p in ens.parameters()]
    change(ens)
    with torch.no_grad():
        ens(X.to(next(ens.parameters()).dtype))
    gc.collect()
    assert replays(ens) == 0
    assert all(found() is None or found().data_ptr() not in kept for found in storages)  # type: ignore[union-attr]


def test_recording_is_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(often, "_recorded", lambda *args: tried.append(args))
    ens = fused()
    with torch.no_grad():
        for _ in range(100):
            ens(X)
    assert len(tried) == 6  # at the 3rd, 6th, 12th, 24th, 48th and 96th call


def test_copies_begin_anew() -> None:
    ens = fused()
    expected = often_called(ens, X)
    for twin in (copy.deepcopy(ens), pickle.loads(pickle.dumps(ens))):
        assert replays(twin) == 0
        assert torch.equal(often_called(twin, X), expected)
        swap(twin)
    with torch.no_grad():
        assert torch.equal(ens(X), expected)


def test_threads() -> None:
    ens = fused()
    inputs = [torch.randn(size, 5) for size in (2, 3, 4, 5)]
    expected = [by_loop(ens, x) for x in inputs]
    wrong: list[str] = []

    def work(k: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(100):
                    torch.testing.assert_close(ens(inputs[k]), expected[k])
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=(k % 4,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= replays(ens) <= 4
