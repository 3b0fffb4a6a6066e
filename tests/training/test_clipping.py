"""Clipping per member against torch's own functions, called for each of N solo members."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from unisono import Ensemble
from unisono.engine.axis import parameters_of
from unisono.errors import EnsembleError
from unisono.training.clipping import clip_grad_norm_, clip_grad_value_

N = 4
F64 = torch.float64


class Scalars(nn.Module):
    """Parameters without axes, of one, of complex numbers, in another precision, tied, unused."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=F64))
        self.bias = nn.Parameter(torch.randn(3, dtype=F64))
        self.phase = nn.Parameter(torch.randn(2, 3, dtype=torch.complex128))
        self.small = nn.Parameter(torch.randn(2, dtype=torch.float32))
        self.tied = self.bias
        self.unused = nn.Parameter(torch.randn(2, dtype=F64))
        self.frozen = nn.Parameter(torch.randn(2, dtype=F64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = (x * self.scale + self.bias) * self.phase.abs().sum(0) + self.tied
        return y * self.small.double().sum()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()).double()


MODELS = {
    "mlp": (mlp, (6, 3)),
    "cnn": (cnn, (6, 3, 5, 5)),
    "scalars": (Scalars, (6, 3)),
}


def trained(name: str) -> tuple[Ensemble, list[nn.Module]]:
    """An ensemble and its members apart, with equal gradients that differ much in size."""
    make, shape = MODELS[name]
    models = [make() for _ in range(N)]
    ens = Ensemble(models, strategy="fused")
    x = torch.randn(shape, dtype=F64)
    sizes = 10.0 ** torch.arange(-2, N - 2, dtype=F64)
    outputs = ens(x)
    (outputs.flatten(1).square().mean(1) * sizes).sum().backward()
    for i, model in enumerate(models):
        for key, parameter in model.named_parameters():
            grad = ens.members.get_parameter(key).grad
            parameter.grad = None if grad is None else grad[i].clone()
    return ens, models


def assert_same_gradients(ens: Ensemble, models: list[nn.Module], **tolerance: float) -> None:
    for name, parameter in ens.members.named_parameters():
        for i, model in enumerate(models):
            want = model.get_parameter(name).grad
            if want is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(
                    parameter.grad[i], want, msg=lambda m, n=name: f"{n}: {m}", **tolerance
                )


LIMITS = {
    "number": 0.3,
    "integer": 1,
    "numpy number": np.float32(0.25),
    "list": [0.1, 0.2, 5.0, 1e9],
    "tuple": (0.1, math.inf, 0.0, 1.0),
    "array": np.array([0.1, 0.2, 0.3, 0.4]),
    "tensor": torch.tensor([0.1, 0.2, 5.0, 1e9], dtype=F64),
    "tensor of one": torch.tensor(0.3, dtype=F64),
}


def own_limit(limit: object, i: int) -> float:
    return float(limit[i]) if np.ndim(limit) else float(limit)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", LIMITS)
def test_norms_as_torch_for_each_member(name, kind):
    ens, models = trained(name)
    norms = clip_grad_norm_(ens, LIMITS[kind])
    want = [
        nn.utils.clip_grad_norm_(model.parameters(), own_limit(LIMITS[kind], i))
        for i, model in enumerate(models)
    ]
    torch.testing.assert_close(norms, torch.stack(want))
    assert_same_gradients(ens, models)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", [1, 1.5, 2.0, 3, 0, math.inf, -math.inf, "inf"], ids=repr)
def test_orders_as_torch_for_each_member(name, order):
    ens, models = trained(name)
    norms = clip_grad_norm_(ens, 0.4, order)
    want = [nn.utils.clip_grad_norm_(model.parameters(), 0.4, order) for model in models]
    torch.testing.assert_close(norms, torch.stack(want))
    assert_same_gradients(ens, models)


@pytest.mark.parametrize("name", ["mlp", "cnn"])  # complex numbers have no order
@pytest.mark.parametrize("kind", LIMITS)
def test_values_as_torch_for_each_member(name, kind):
    ens, models = trained(name)
    assert clip_grad_value_(ens, LIMITS[kind]) is None
    for i, model in enumerate(models):
        nn.utils.clip_grad_value_(model.parameters(), own_limit(LIMITS[kind], i))
    assert_same_gradients(ens, models, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_a_spoiled_member_does_not_touch_the_others(clip, value):
    ens, models = trained("mlp")
    alone = copy.deepcopy(ens)
    for p, q in zip(ens.parameters(), alone.parameters(), strict=True):
        q.grad = p.grad.clone()
    models[1][0].weight.grad[2, 1] = value
    ens.members.get_parameter("0.weight").grad[1, 2, 1] = value
    torch_clip = getattr(nn.utils, clip.__name__)
    norms = clip(ens, 0.3)
    want = [torch_clip(model.parameters(), 0.3) for model in models]
    if norms is not None:
        torch.testing.assert_close(norms, torch.stack(want), equal_nan=True)
    clip(alone, 0.3)
    others = [0, 2, 3]
    for (name, p), q in zip(ens.members.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad[others], q.grad[others], rtol=0, atol=0)
        torch.testing.assert_close(p.grad[1], models[1].get_parameter(name).grad, equal_nan=True)


def test_nonfinite_norms_raise_before_anything_is_changed():
    ens, models = trained("mlp")
    ens.members.get_parameter("0.bias").grad[1, 0] = math.nan
    ens.members.get_parameter("0.bias").grad[3, 0] = math.inf
    before = [p.grad.clone() for p in ens.parameters()]
    with pytest.raises(RuntimeError, match=r"norms of order 2\.0 aren't finite") as caught:
        clip_grad_norm_(ens, 0.1, error_if_nonfinite=True)
    assert str(caught.value) == (
        "clip_grad_norm_: norms of order 2.0 aren't finite, so nothing was clipped:\n\n"
        "  member 1: nan\n  member 3: inf\n\n"
        "error_if_nonfinite=False scales by them all the same; it spoils only the gradients of"
        " these members."
    )
    for p, grad in zip(ens.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, grad, equal_nan=True, rtol=0, atol=0)
    ens, models = trained("mlp")
    norms = clip_grad_norm_(ens, 0.1, error_if_nonfinite=True)
    want = [
        nn.utils.clip_grad_norm_(model.parameters(), 0.1, error_if_nonfinite=True)
        for model in models
    ]
    torch.testing.assert_close(norms, torch.stack(want))


def test_the_norm_of_a_member_is_at_most_its_limit():
    ens, _ = trained("mlp")
    limits = [0.001, 0.01, 1.0, 10.0]
    before = clip_grad_norm_(ens, limits)
    after = clip_grad_norm_(ens, math.inf)
    assert (before > torch.tensor(limits)).any()
    assert (after <= torch.tensor(limits, dtype=F64) * (1 + 1e-9)).all()


def test_without_gradients():
    ens = Ensemble([mlp() for _ in range(N)])
    torch.testing.assert_close(clip_grad_norm_(ens, 1.0), torch.zeros(N))
    assert clip_grad_value_(ens, 1.0) is None
    nothing = Ensemble([nn.Identity() for _ in range(N)])
    torch.testing.assert_close(clip_grad_norm_(nothing, 1.0), torch.zeros(N))


def reordered(grad: Tensor) -> Tensor:
    """The same numbers in another order in memory, the member axis outermost."""
    axes = [0, *reversed(range(1, grad.dim()))]
    return grad.permute(axes).contiguous().permute(axes)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("limit", [0.3, [0.1, 0.2, 5.0, 1e9]])
def test_other_orders_in_memory(name, limit):
    ens, models = trained(name)
    for p in ens.parameters():
        p.data, p.grad = reordered(p.data), reordered(p.grad)
    assert any(not p.grad.is_contiguous() for p in ens.parameters())
    pointers = [(p.grad.data_ptr(), p.grad.stride()) for p in ens.parameters()]
    norms = clip_grad_norm_(ens, limit)
    want = [
        nn.utils.clip_grad_norm_(model.parameters(), own_limit(limit, i))
        for i, model in enumerate(models)
    ]
    torch.testing.assert_close(norms, torch.stack(want))
    assert_same_gradients(ens, models)
    assert pointers == [(p.grad.data_ptr(), p.grad.stride()) for p in ens.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("limit", [0.3, [0.1, 0.2, 5.0, 1e9]])
def test_other_dtypes(dtype, limit):
    ens, models = trained("mlp")
    for module in (ens, *models):
        for p in module.parameters():
            p.data, grad = p.data.to(dtype), p.grad.to(dtype)
            p.grad = grad
    norms = clip_grad_norm_(ens, limit)
    want = [
        nn.utils.clip_grad_norm_(model.parameters(), own_limit(limit, i))
        for i, model in enumerate(models)
    ]
    tolerance = {} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    assert norms.dtype is dtype
    torch.testing.assert_close(norms, torch.stack(want), **tolerance)
    assert_same_gradients(ens, models, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    ens, _ = trained("mlp")
    for p in ens.parameters():
        p.data, grad = p.data.to(dtype), p.grad.to(dtype)
        p.grad = grad
    limits = [0.00123, 0.0123, 0.123, 0.3]
    before = [p.grad.float() for p in ens.parameters()]
    norms = clip_grad_norm_(ens, limits)
    factors = (torch.tensor(limits) / (norms + 1e-6).float()).clamp(max=1.0)
    assert (factors < 0.9).all()
    for p, grad in zip(ens.parameters(), before, strict=True):
        want = (grad * factors.reshape(N, *[1] * (grad.dim() - 1))).to(dtype)
        torch.testing.assert_close(p.grad, want, rtol=0, atol=0)


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("per_member", [False, True])
@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_the_number_of_ops_does_not_grow_with_the_members(clip, per_member):
    counts = []
    for n in (3, 9):
        ens = Ensemble([mlp() for _ in range(n)])
        ens(torch.randn(5, 3, dtype=F64)).sum().backward()
        with Count() as count:
            clip(ens, [0.1] * n if per_member else 0.1)
        counts.append(count.ops)
    assert counts[0] == counts[1]


@torch.no_grad()
@pytest.mark.parametrize("limit", [0.1, [0.1] * N])
def test_gradients_stay_on_the_device_and_nothing_waits(limit):
    mode = FakeTensorMode()

    def fake(tensor):
        return FakeTensor(mode, torch.empty_like(tensor, device="meta"), torch.device("cuda", 0))

    ens = Ensemble([mlp() for _ in range(N)])
    for tree in ens.members.modules():
        for key, p in parameters_of(tree).items():
            parameters_of(tree)[key] = nn.Parameter(fake(p), requires_grad=False)
            parameters_of(tree)[key].grad = fake(p)
    with mode:
        limits = torch.full((N,), 0.1, dtype=F64) if isinstance(limit, list) else limit
        norms = clip_grad_norm_(ens, fake(limits) if isinstance(limits, Tensor) else limits)
        clip_grad_value_(ens, fake(limits) if isinstance(limits, Tensor) else limits)
    assert (norms.device.type, norms.shape) == ("cuda", (N,))


# --- parameters shared by all members ---


class Headed(nn.Module):
    """A backbone that the members may share, and a head of each."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 4, dtype=F64)
        self.head = nn.Linear(4, 2, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).tanh())


def with_backbone() -> tuple[Ensemble, list[nn.Module], nn.Module]:
    ens = Ensemble.build(Headed, N, shared="backbone.*")
    ens(torch.randn(6, 3, dtype=F64)).square().mean((1, 2)).sum().mul(5).backward()
    heads = [nn.Linear(4, 2, dtype=F64) for _ in range(N)]
    for i, head in enumerate(heads):
        head.weight.grad = ens.members.head.weight.grad[i].clone()
        head.bias.grad = ens.members.head.bias.grad[i].clone()
    backbone = nn.Linear(3, 4, dtype=F64)
    backbone.weight.grad = ens.members.backbone.weight.grad.clone()
    backbone.bias.grad = ens.members.backbone.bias.grad.clone()
    return ens, heads, backbone


def assert_clipped(ens: Ensemble, heads: list[nn.Module], backbone: nn.Module) -> None:
    for key in ("weight", "bias"):
        got = ens.members.head.get_parameter(key).grad
        torch.testing.assert_close(got, torch.stack([h.get_parameter(key).grad for h in heads]))
        torch.testing.assert_close(
            ens.members.backbone.get_parameter(key).grad, backbone.get_parameter(key).grad
        )


@pytest.mark.parametrize("shared", [0.05, math.inf])
@pytest.mark.parametrize("limit", [0.1, [0.1, 0.2, 0.3, 9.0]])
def test_a_shared_backbone_is_clipped_by_itself(limit, shared):
    ens, heads, backbone = with_backbone()
    norms = clip_grad_norm_(ens, limit, shared_max_norm=shared)
    want = [
        nn.utils.clip_grad_norm_(h.parameters(), own_limit(limit, i)) for i, h in enumerate(heads)
    ]
    nn.utils.clip_grad_norm_(backbone.parameters(), shared)
    torch.testing.assert_close(norms, torch.stack(want))
    assert_clipped(ens, heads, backbone)


@pytest.mark.parametrize(
    ("limit", "shared", "of_backbone"),
    [(0.02, None, 0.02), (0.02, 0.01, 0.01), ([0.1, 0.02, 0.3, 9.0], 0.01, 0.01)],
)
def test_values_of_a_shared_backbone(limit, shared, of_backbone):
    ens, heads, backbone = with_backbone()
    clip_grad_value_(ens, limit, shared_clip_value=shared)
    for i, head in enumerate(heads):
        nn.utils.clip_grad_value_(head.parameters(), own_limit(limit, i))
    nn.utils.clip_grad_value_(backbone.parameters(), of_backbone)
    assert_clipped(ens, heads, backbone)


def test_shared_parameters_need_a_word():
    ens, _, _ = with_backbone()
    before = [p.grad.clone() for p in ens.parameters()]
    with pytest.raises(EnsembleError, match="clipped by itself") as caught:
        clip_grad_norm_(ens, 1.0)
    assert str(caught.value) == (
        "clip_grad_norm_: each of the 4 members is clipped by itself, but these parameters are"
        " shared by all members and have one gradient, which belongs to none:\n\n"
        "  `backbone.weight`: (4, 3)\n  `backbone.bias`: (4,)\n\n"
        "Say what happens to them:\n\n"
        "    clip_grad_norm_(ens, 1.0, shared_max_norm=1.0)           # clipped together, by"
        " themselves\n"
        "    clip_grad_norm_(ens, 1.0, shared_max_norm=float('inf'))  # left as they are"
    )
    with pytest.raises(EnsembleError, match=r"shared_clip_value=1\.0"):
        clip_grad_value_(ens, [1.0] * N)
    for p, grad in zip(ens.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)


def test_a_frozen_backbone_needs_none():
    ens = Ensemble.build(Headed, N, shared="backbone.*")
    ens.members.backbone.requires_grad_(False)
    ens(torch.randn(6, 3, dtype=F64)).sum().backward()
    assert clip_grad_norm_(ens, 0.1).shape == (N,)
    clip_grad_value_(ens, [0.1] * N)


def test_the_norm_of_shared_parameters_must_be_finite_too():
    ens, _, _ = with_backbone()
    ens.members.backbone.bias.grad[0] = math.inf
    with pytest.raises(RuntimeError, match="the parameters shared by all members: inf"):
        clip_grad_norm_(ens, 1.0, error_if_nonfinite=True, shared_max_norm=1.0)


# --- wrong arguments ---


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_another_number_of_values(clip):
    ens, _ = trained("mlp")
    for limit in ([1.0] * 3, torch.ones(N, 1), np.ones((2, N))):
        with pytest.raises(ValueError, match="is a number or one for each of the 4 members") as e:
            clip(ens, limit)
    assert str(e.value).endswith(
        f"got shape (2, 4); write {clip.__name__}(ens, 1.0) or {clip.__name__}(ens, [1.0] * 4)"
    )


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_wrong_values(clip):
    ens, _ = trained("mlp")
    name = "max_norm" if clip is clip_grad_norm_ else "clip_value"
    with pytest.raises(ValueError, match=rf"{name} is zero or more, but {name} is -1.0"):
        clip(ens, -1.0)
    expected = rf"{name} is zero or more, but {name}\[1\] is nan, {name}\[3\] is -2.0"
    with pytest.raises(ValueError, match=expected):
        clip(ens, [1.0, math.nan, 1.0, -2.0])
    for wrong in ("1", None, True, {1.0}):
        with pytest.raises(TypeError, match=f"{name} is a number or one for each member, got"):
            clip(ens, wrong)
    keyword = f"shared_{name}"
    with pytest.raises(TypeError, match=rf"{keyword} is one number, got \[1.0\]"):
        clip(ens, [1.0] * N, **{keyword: [1.0]})
    with pytest.raises(ValueError, match=f"{keyword} is zero or more, but {keyword} is -1.0"):
        clip(ens, [1.0] * N, **{keyword: -1.0})


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_sparse_gradients(clip):
    ens = Ensemble([nn.Embedding(5, 3) for _ in range(N)])
    ens.members.weight.grad = torch.zeros(N, 5, 3).to_sparse()
    with pytest.raises(TypeError, match="gradients are dense tensors") as caught:
        clip(ens, 1.0)
    assert "\n  `weight`: torch.sparse_coo\n\nBuild their layers with sparse=False." in str(
        caught.value
    )
