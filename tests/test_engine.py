"""How a call runs: fallbacks and their warnings, what is put back, random numbers, torch's vmap."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import unisono
from unisono import Ensemble, EnsembleError, EnsembleWarning, UnsupportedModelError, per_member

X = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)


def ensemble_of(make: type[nn.Module], n: int = 3, **options: object) -> Ensemble:
    return Ensemble([make().double() for _ in range(n)], **options)


class Round(nn.Module):
    """Leaves torch for a moment."""

    def forward(self, x: Tensor) -> Tensor:
        return x * round(x.abs().max().item() + 1)


class Rounds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), Round())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Tagger(nn.Module):
    """An LSTM makes its list of weights anew when it finds other ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


class Branches(nn.Module):
    """Branches on a value, after writing a buffer and drawing random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x)) + 0 * torch.rand(())
        return y if y.sum() > 0 else -y


class Fails(nn.Module):
    """Writes its buffers, then fails."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(7, 2)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        if self.error is not None:
            raise self.error
        return self.linear(y)


# Falling back to the loop


def test_what_cannot_be_fused_runs_by_loop_and_says_so_once() -> None:
    ens = ensemble_of(Rounds)
    with pytest.warns(EnsembleWarning) as caught:
        outputs = [ens(X), ens(X)][0]  # no second warning
    torch.testing.assert_close(outputs, torch.stack([member(X) for member in ens]))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    text = str(caught[0].message)
    assert text.startswith("Ensemble of 3 Rounds: `inner.1` (Round), test_engine.py:")
    assert "can't run for all members at once, so this call runs member by member" in text
    assert "reason: Tensor.item: the members gave different values: " in text
    assert (
        'strategy="loop" says that the loop is fine, strategy="fused" makes this an error' in text
    )


def test_the_gradients_of_an_lstm_by_loop() -> None:
    ens = ensemble_of(Tagger, strategy="loop")
    models = ens.unstack()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    ens(x).square().sum().backward()
    for i, model in enumerate(models):
        model(x).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(ens.members.get_parameter(name).grad[i], parameter.grad)


def test_members_of_an_lstm_follow_the_weights_after_a_call() -> None:
    ens = ensemble_of(Tagger, strategy="loop")
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    ens(x)  # nn.LSTM makes its flat list of weights anew here
    with torch.no_grad():
        for parameter in ens.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(ens[1](x), ens(x)[1])
    torch.testing.assert_close(ens.unstack()[1](x), ens(x)[1])
    assert not ens._planner.pool.attributes  # the list is no state of its own


def test_a_fallback_leaves_buffers_and_random_state_as_if_it_had_been_the_loop_at_once() -> None:
    auto, loop = ensemble_of(Branches), None
    loop = Ensemble(auto.unstack(), strategy="loop")
    torch.manual_seed(1)
    with pytest.warns(EnsembleWarning, match="the members gave different values"):
        outputs = auto(X)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.testing.assert_close(outputs, loop(X))
    assert torch.equal(after, torch.get_rng_state())
    for name, buffer in auto.named_buffers():
        assert torch.equal(buffer, loop.get_buffer(name)), name


@pytest.mark.parametrize("strategy", ["fused", "vmap"])
def test_a_strategy_that_was_asked_for_is_not_replaced(strategy: str) -> None:
    ens = ensemble_of(Branches, strategy=strategy)
    before = {name: buffer.clone() for name, buffer in ens.named_buffers()}
    with pytest.raises(RuntimeError, match="data-dependent control flow") as info:
        ens(X)
    assert any("`Branches.forward`" in note for note in info.value.__notes__)
    assert all(torch.equal(ens.get_buffer(name), value) for name, value in before.items())


def test_an_error_of_the_model_itself_is_the_users_own_without_a_warning() -> None:
    ens = ensemble_of(Fails)
    before = {name: buffer.clone() for name, buffer in ens.named_buffers()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied"
        ) as info:
            ens(X)
    assert info.value.__notes__ == ["ens(...): raised in `linear` (Linear) of member 0"]
    assert info.value.__suppress_context__ or info.value.__context__ is None
    assert all(torch.equal(ens.get_buffer(name), value) for name, value in before.items())


@pytest.mark.parametrize("strategy", ["auto", "fused", "vmap", "loop"])
def test_after_an_interrupt_everything_is_as_before(strategy: str) -> None:
    ens = ensemble_of(Fails, strategy=strategy)
    before = {name: buffer.clone() for name, buffer in ens.named_buffers()}

    def interrupted(member: nn.Module, x: Tensor) -> Tensor:
        member.norm(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ens.run(interrupted, X)
    assert all(torch.equal(ens.get_buffer(name), value) for name, value in before.items())
    assert torch._C._functorch.maybe_current_level() is None
    outputs = ens.run(lambda member, x: member.norm(x), X)
    torch.testing.assert_close(outputs[0], ens[0].norm(X))


# fn(member, ...)


def test_run_may_call_a_member_twice_and_its_parts() -> None:
    ens = ensemble_of(Branches).eval()
    models = ens.unstack()

    def fn(member: nn.Module, x: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        y = member.linear(member.linear(x))
        penalty = sum(p.square().sum() for p in member.parameters())
        return (y - x).square().mean() * scale, penalty

    loss, penalty = ens.run(fn, X, scale=2.0)
    assert loss.shape == penalty.shape == (3,)
    for i, model in enumerate(models):
        torch.testing.assert_close((loss[i], penalty[i]), fn(model, X, scale=2.0))


@dataclass
class Scaled:
    """A callable that can't be hashed, because it compares by value."""

    factor: float

    def __call__(self, member: nn.Module, x: Tensor) -> Tensor:
        return member.linear(x) * self.factor


def test_run_takes_any_callable_and_remembers_none_of_them() -> None:
    ens = ensemble_of(Branches).eval()
    for factor in (1.0, 2.0, 3.0):
        expected = torch.stack([member.linear(X) * factor for member in ens])
        torch.testing.assert_close(ens.run(Scaled(factor), X), expected)
        partial = functools.partial(Scaled.__call__, Scaled(factor))
        torch.testing.assert_close(ens.run(partial, X), expected)
    assert len(ens._planner._plans) == 2  # one kind of call each, however many objects


def test_derivatives_inside_run() -> None:
    ens = Ensemble([nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double() for _ in range(3)])

    def jacobian(member: nn.Module, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(member))(x)

    torch.testing.assert_close(
        ens.run(jacobian, X), torch.stack([jacobian(member, X) for member in ens])
    )


# Outputs that can't be joined


class ShapeByValue(nn.Module):
    """Returns as many rows as its buffer says."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.randint(1, 5, ()))

    def forward(self, x: Tensor) -> Tensor:
        return x[: int(self.rows)]


class NumberByValue(ShapeByValue):
    def forward(self, x: Tensor) -> dict[str, object]:
        return {"y": x, "count": int(self.rows)}


class KeysByValue(ShapeByValue):
    def forward(self, x: Tensor) -> dict[str, object]:
        return {f"y{int(self.rows)}": x}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (ShapeByValue, r"the output can't be stacked: .* shapes \(1, 3\), \(2, 3\); pad them"),
        (NumberByValue, r"the output\['count'\] isn't a tensor and differs .* \(1, 2\)"),
        (KeysByValue, r"member 1 returned \{\['y2'\]: Tensor\}; member 0 returned \{\['y1'\]"),
    ],
)
def test_outputs_that_do_not_fit_together(make: type[nn.Module], text: str) -> None:
    models = [make(), make()]
    for i, model in enumerate(models):
        model.rows.fill_(i + 1)
    ens = Ensemble(models, strategy="loop")
    with pytest.raises(EnsembleError, match=text):
        ens(X)


# State that forward leaves in the model


class RegistersBuffer(nn.Module):
    """Registers a buffer in its first forward, as older code does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if not hasattr(self, "first"):
            self.register_buffer("first", y.detach().mean(0))
        return y - self.first


@pytest.mark.parametrize("strategy", ["fused", "loop"])
def test_a_buffer_registered_in_forward(strategy: str) -> None:
    ens = ensemble_of(RegistersBuffer, strategy=strategy)
    models = ens.unstack()
    for x in (X, 2 * X):
        torch.testing.assert_close(ens(x), torch.stack([m(x) for m in models]))
    assert ens.members.first.shape == (3, 3)
    torch.testing.assert_close(ens[1].first, models[1].first)


class AddsLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.late = nn.Linear(3, 3)
        return self.linear(x)


def test_a_layer_made_in_forward_is_refused() -> None:
    ens = ensemble_of(AddsLayer)
    with pytest.raises(UnsupportedModelError, match="forward assigns the submodule `late`"):
        ens(X)
    assert not hasattr(ens[0], "late")


class KeepsActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.activation = self.linear(x)
        return self.activation.relu()


@pytest.mark.parametrize("strategy", ["fused", "vmap", "loop"])
def test_a_kept_activation_is_stacked_and_members_have_their_own(strategy: str) -> None:
    ens = ensemble_of(KeepsActivation, strategy=strategy)
    ens(X)
    expected = torch.stack([member.linear(X) for member in ens])
    torch.testing.assert_close(ens.members.activation, expected)
    torch.testing.assert_close(ens[1].activation, expected[1])
    torch.testing.assert_close(ens[[2, 0]](X), ens(X)[[2, 0]])


# Random numbers


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.dropout = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.ones_like(self.linear(x)))


@pytest.mark.parametrize("strategy", ["fused", "vmap", "loop"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_randomness(strategy: str, chunk_size: int | None) -> None:
    ens = ensemble_of(Noisy, strategy=strategy, chunk_size=chunk_size)
    x = torch.zeros(2000, 3, dtype=torch.float64)
    masks = ens(x) > 0
    # Each mask keeps three quarters: 6,000 draws, so 0.02 is more than three standard deviations.
    assert ((masks.double().mean((1, 2)) - 0.75).abs() < 0.02).all()
    # Two independent masks agree in 0.75**2 + 0.25**2 of the places.
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert abs((masks[i] == masks[j]).double().mean() - 0.625) < 0.02
    ens.randomness = "same"
    same = ens(x)
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    assert not torch.equal(same, ens(x))
    torch.manual_seed(0)
    first = ens(x)
    torch.manual_seed(0)
    assert torch.equal(first, ens(x))
    ens.randomness = "error"
    with pytest.raises((RuntimeError, EnsembleError), match="random"):
        ens(x)
    ens.eval()
    assert ens(x).shape == (3, 2000, 3)


# Attention


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return self.attention(y, y, y)


@pytest.mark.parametrize("strategy", ["fused", "vmap", "loop"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_attention_has_its_gradient_in_eval_mode_too(strategy: str, training: bool) -> None:
    ens = ensemble_of(Attends, strategy=strategy).train(training)
    models = ens.unstack()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    outputs, weights = ens(x)
    (outputs.square().sum() + weights.square().sum()).backward()
    assert torch.backends.mha.get_fastpath_enabled()
    for i, model in enumerate(models):
        y, w = model(x)
        torch.testing.assert_close((outputs[i], weights[i]), (y, w))
        (y.square().sum() + w.square().sum()).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(ens.members.get_parameter(name).grad[i], parameter.grad)


def test_a_sparse_embedding_gets_the_same_gradient_dense() -> None:
    ens = Ensemble([nn.Embedding(6, 3, sparse=True).double() for _ in range(3)], strategy="fused")
    models = ens.unstack()
    ids = torch.tensor([1, 4, 4])
    ens(ids).square().sum().backward()
    for i, model in enumerate(models):
        model(ids).square().sum().backward()
        torch.testing.assert_close(ens.members.weight.grad[i], model.weight.grad.to_dense())


# Checkpoints of activations


def test_an_ensemble_inside_a_checkpoint() -> None:
    ens = ensemble_of(Branches, strategy="fused").eval()
    xs = torch.randn(3, 5, 3, dtype=torch.float64)

    def loss(member: nn.Module, x: Tensor) -> Tensor:
        return member.linear(member.norm(x)).square().sum()

    ens.run(loss, per_member(xs)).sum().backward()
    expected = {name: p.grad for name, p in ens.named_parameters()}
    ens.zero_grad()
    checkpoint(lambda x: ens.run(loss, per_member(x)), xs, use_reentrant=False).sum().backward()
    for name, parameter in ens.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


# Neighbours in the process


def test_other_users_of_vmap_get_what_they_always_got() -> None:
    code = textwrap.dedent(
        """
        import torch
        from neighbours import ops_of_plain_vmap
        before = ops_of_plain_vmap()
        assert "aten::bmm" in before
        import unisono
        assert ops_of_plain_vmap() == before
        unisono.Ensemble([torch.nn.Linear(4, 2) for _ in range(3)])(torch.randn(5, 4))
        assert ops_of_plain_vmap() == before
        """
    )
    folders = [Path(unisono.__file__).parents[1], Path(__file__).parent]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_vmap_inside_a_member_is_torchs_own_and_right() -> None:
    class PerRow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.linear)(x)

    ens = ensemble_of(PerRow, strategy="fused")
    torch.testing.assert_close(ens(X), torch.stack([m.linear(X) for m in ens]))
    xs = torch.stack([X, X + 1, X + 2])
    torch.testing.assert_close(
        ens(per_member(xs)), torch.stack([m.linear(x) for m, x in zip(ens, xs, strict=True)])
    )


def test_autocast_is_that_of_the_plain_model() -> None:
    models = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(3)]
    ens = Ensemble(models, strategy="fused")
    with torch.autocast("cpu", torch.bfloat16):
        outputs = ens(X.float())
        expected = torch.stack([m(X.float()) for m in models])
    assert outputs.dtype == expected.dtype == torch.bfloat16
    # One product against one product: they differ in the last of bfloat16's 8 bits at most.
    torch.testing.assert_close(outputs, expected, rtol=2**-7, atol=2**-7)


class KeepsPrevious(nn.Module):
    """Moves one kept value on to another attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("now", torch.zeros(3))
        self.before = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.before, self.now = self.now, y.detach().mean(0)
        return y - self.before


@pytest.mark.parametrize("strategy", ["fused", "vmap", "loop"])
def test_a_buffer_moved_on_to_an_attribute(strategy: str) -> None:
    ens = ensemble_of(KeepsPrevious, strategy=strategy)
    models = ens.unstack()
    for x in (X, 2 * X, 3 * X):
        torch.testing.assert_close(ens(x), torch.stack([m(x) for m in models]))
    torch.testing.assert_close(ens[1].before, models[1].before)


class KeepsHistory(nn.Module):
    """Appends to a list and caches by shape in a dict, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.history: list[Tensor] = []
        self.cache: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if len(x) not in self.cache:
            self.cache[len(x)] = torch.ones(len(x), 1, dtype=x.dtype)
        self.history.append(self.linear(x).detach())
        return sum(self.history) * self.cache[len(x)]


@pytest.mark.parametrize("strategy", ["fused", "vmap", "loop"])
def test_lists_and_dicts_changed_in_place_belong_to_each_member(strategy: str) -> None:
    ens = ensemble_of(KeepsHistory, strategy=strategy)
    models = ens.unstack()
    for x in (X, 2 * X, 3 * X):
        torch.testing.assert_close(ens(x), torch.stack([m(x) for m in models]))
    assert len(ens.members.history) == 3
    assert ens.members.history[2].shape == (3, 5, 3)
    torch.testing.assert_close(ens[1].history, models[1].history)


def test_an_lstm_takes_its_weights_without_making_its_list_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [nn.LSTM(3, 4).double() for _ in range(3)]
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    expected = torch.stack([model(x)[0] for model in models])
    ens = Ensemble(models, strategy="fused")
    ens(x)
    made: list[object] = []
    monkeypatch.setattr(nn.RNNBase, "_init_flat_weights", lambda self: made.append(self))
    torch.testing.assert_close(ens(x)[0], expected)
    assert made == []
