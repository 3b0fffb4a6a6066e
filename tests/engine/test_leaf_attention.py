"""Self-attention in training takes its rule, and all else what the class of torch does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unisono import Ensemble, per_member
from unisono.engine import leaf_attention

N = 3


class ToItself(nn.Module):
    """Attention of a sequence to itself, with the options of a call."""

    def __init__(self, call: dict[str, object] | None = None, **options: object) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, **options)  # type: ignore[arg-type]
        self.call = {"need_weights": False} if call is None else call

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.attention(x, x, x, **self.call)
        return y if weights is None else y + weights.sum()


class ToOther(nn.Module):
    """Attention to another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x + 1, x + 1, need_weights=False)[0]


class Subclass(nn.MultiheadAttention):
    """Not torch's own class."""


def subclassed() -> ToItself:
    model = ToItself()
    model.attention = Subclass(8, 2)
    return model


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whether the rule was taken."""
    taken: list[str] = []
    rule = leaf_attention.self_attention

    def seen(*args: object) -> object:
        found = rule(*args)  # type: ignore[arg-type]
        taken.append("none" if found is None else "rule")
        return found

    monkeypatch.setattr(leaf_attention, "self_attention", seen)
    return taken


def gradients_equal_the_loop(make: Callable[[], nn.Module], *shape: int) -> None:
    torch.manual_seed(0)
    models = [make().double() for _ in range(N)]
    for own in (True, False):
        ens = Ensemble(models, strategy="fused")
        x = torch.randn(*([N] if own else []), *shape, dtype=torch.float64)
        y = ens(per_member(x) if own else x)
        wanted = torch.stack([m(x[i] if own else x) for i, m in enumerate(models)])
        torch.testing.assert_close(y, wanted)
        y.square().sum().backward()
        for model in models:
            model.zero_grad()
        wanted.square().sum().backward()
        for name, stacked in ens.members.named_parameters():
            found = [model.get_parameter(name).grad for model in models]
            torch.testing.assert_close(stacked.grad, torch.stack(found), msg=name)


BY_RULE = {
    "sequence first": ToItself,
    "batch first": lambda: ToItself(batch_first=True),
    "without bias": lambda: ToItself(bias=False, batch_first=True),
    "eval with gradients": lambda: ToItself(dropout=0.5).eval(),
    "layer of a Transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0),
}
BY_CLASS = {
    "weights": lambda: ToItself({}),
    "mask": lambda: ToItself({"need_weights": False, "attn_mask": torch.eye(5).bool()}),
    "padding": lambda: ToItself(
        {"need_weights": False, "key_padding_mask": torch.arange(5).expand(4, 5) > 3}
    ),
    "causal": lambda: ToItself(
        {"need_weights": False, "attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True}
    ),
    "added": lambda: ToItself(add_bias_kv=True),
    "zeros": lambda: ToItself(add_zero_attn=True),
    "other sequence": ToOther,
    "subclass": subclassed,
}


@pytest.mark.parametrize("make", BY_RULE.values(), ids=BY_RULE)
def test_by_rule(make: Callable[[], nn.Module], runs: list[str]) -> None:
    gradients_equal_the_loop(make, 5, 4, 8)
    assert runs == ["rule", "rule"]


@pytest.mark.parametrize("make", BY_CLASS.values(), ids=BY_CLASS)
def test_by_class(make: Callable[[], nn.Module], runs: list[str]) -> None:
    gradients_equal_the_loop(make, 5, 4, 8)
    assert runs == []


def test_a_sequence_without_batch_is_left_to_the_class(runs: list[str]) -> None:
    gradients_equal_the_loop(ToItself, 5, 8)
    assert runs == ["none", "none"]


def test_dropout_is_left_to_the_class(runs: list[str]) -> None:
    ens = Ensemble([ToItself(dropout=0.5) for _ in range(N)], strategy="fused")
    x = torch.randn(5, 4, 8)
    assert not torch.equal(ens(x), ens(x))
    assert runs == []


def test_under_autocast_it_is_the_loop_under_autocast(runs: list[str]) -> None:
    models = [ToItself(batch_first=True) for _ in range(N)]
    x = torch.randn(4, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = Ensemble(models, strategy="fused")(x)
        wanted = torch.stack([model(x) for model in models])
    assert y.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(y, wanted, atol=2e-2, rtol=2e-2)
    assert runs == ["rule"]


def test_gradients_of_gradients(runs: list[str]) -> None:
    models = [ToItself(batch_first=True).double() for _ in range(2)]
    ens = Ensemble(models, strategy="fused")
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(lambda x: ens(x).tanh(), (x,), atol=1e-6)
    assert set(runs) == {"rule"}


def test_a_wrong_width_is_told() -> None:
    ens = Ensemble([ToItself() for _ in range(N)], strategy="fused")
    with pytest.raises(AssertionError, match="was expecting embedding dimension of 8, but got 7"):
        ens(torch.randn(5, 4, 7))


class Ops(TorchDispatchMode):
    """The names of all ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_no_gradient_of_three_times_the_size() -> None:
    """Three selects would each have one, with zeros for the other two."""
    ens = Ensemble([ToItself(batch_first=True) for _ in range(N)], strategy="fused")
    loss = ens(torch.randn(4, 5, 8)).square().sum()
    with Ops() as ops:
        loss.backward()
    assert "aten::stack" in ops.seen or "aten::cat" in ops.seen
    assert not {"aten::select_backward", "aten::new_zeros"} & set(ops.seen)
