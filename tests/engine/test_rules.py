"""What rules promise beyond equal numbers: how few ops they take, and the corners they leave."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unisono import Ensemble, per_member

N = 3


class Counted(TorchDispatchMode):
    """Counts the ops that compute something, by name without overload."""

    VIEWS = frozenset(
        "view permute transpose t unsqueeze squeeze expand select unbind split slice alias detach"
        " as_strided _unsafe_view reshape movedim".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.ops[name] += 1
        return func(*args, **(kwargs or {}))


def build(make: Any, training: bool = False, **options: Any) -> tuple[Ensemble, list[nn.Module]]:
    """A fused ensemble in float64, and models equal to its members."""
    models = [make().double().train(training) for _ in range(N)]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return Ensemble(copy.deepcopy(models), strategy="fused", **options), models


def ops_of(ens: Ensemble, *inputs: Tensor) -> Counter[str]:
    ens(*inputs)  # so that everything is made and looked up
    with Counted() as counted:
        ens(*inputs)
    return counted.ops


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Call(nn.Module):
    """A function of one parameter and the inputs."""

    def __init__(self, fn: Any, *shape: int) -> None:
        super().__init__()
        self.fn = fn
        self.w = nn.Parameter(torch.randn(shape))

    def forward(self, *inputs: Tensor) -> Any:
        return self.fn(self.w, *inputs)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_a_native_encoder_layer_takes_four_products_whatever_the_number_of_members() -> None:
    ens, _ = build(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    with torch.no_grad():
        ops = ops_of(ens, per_member(randn(N, 4, 5, 8)))
    assert ops["baddbmm"] + ops["baddbmm_"] == 4
    assert ops["_scaled_dot_product_flash_attention_for_cpu"] == 1
    assert ops["native_layer_norm"] == 2
    assert sum(ops.values()) <= 14, ops


def test_attention_that_is_not_native_copies_no_weight() -> None:
    ens, _ = build(SelfAttention, training=True)
    x, size = per_member(randn(N, 4, 5, 8)), N * 4 * 5 * 8
    weight = ens.members.attention.in_proj_weight
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if func.overloadpacket.__name__ in ("clone", "copy_", "_to_copy"):
                largest = max(largest, result.numel())
            return result

    ens(x)
    with Sizes():
        ens(x)
    assert largest <= 3 * size < 5 * weight.numel()  # once per row it would be twenty times
    ops = ops_of(ens, x)
    assert ops["baddbmm"] == 2  # in and out


@pytest.mark.parametrize(
    ("make", "shape", "expected"),
    [
        (lambda: nn.LayerNorm(6), (4, 6), {"native_layer_norm": 1, "addcmul": 1}),
        (lambda: nn.LayerNorm(6, bias=False), (4, 6), {"native_layer_norm": 1, "mul": 1}),
        (lambda: nn.GroupNorm(2, 6), (4, 6, 5), {"native_group_norm": 1, "addcmul": 1}),
        (
            lambda: nn.Sequential(nn.Conv1d(6, 6, 3), nn.GroupNorm(2, 6)),
            (4, 6, 5),
            {"clone": 1, "convolution": 1, "native_group_norm": 1},
        ),
        (
            lambda: nn.Sequential(nn.Conv1d(6, 6, 1), nn.GroupNorm(2, 6)),
            (4, 6, 5),
            {"clone": 2, "baddbmm": 1, "native_group_norm": 1},
        ),
        (
            lambda: nn.Sequential(
                nn.ConvTranspose1d(6, 4, 2), nn.ReLU(), nn.ConvTranspose1d(4, 6, 2)
            ),
            (4, 6, 5),
            {"clone": 1, "convolution": 2, "relu": 1},
        ),
    ],
    ids=[
        *("layer_norm", "layer_norm-without-bias", "group_norm", "conv-group_norm"),
        *("pointwise-group_norm", "transposed"),
    ],
)
def test_ops_of_a_layer(make: Any, shape: tuple[int, ...], expected: dict[str, int]) -> None:
    ens, _ = build(make)
    with torch.no_grad():
        assert ops_of(ens, per_member(randn(N, *shape))) == expected


def test_upsampling_between_convolutions_copies_nothing_but_the_input() -> None:
    ens, _ = build(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
            *(nn.Upsample(scale_factor=2), nn.ZeroPad2d(1), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3)),
        )
    )
    with torch.no_grad():
        ops = ops_of(ens, per_member(randn(N, 2, 2, 6, 6)))
    assert ops["clone"] + ops["copy_"] + ops["contiguous"] <= 2, ops  # and the padding's own


@pytest.mark.parametrize("need_weights", [True, False])
def test_rows_that_attend_to_nothing_are_what_torch_makes_of_them(
    need_weights: bool,
) -> None:
    ens, models = build(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    x, hidden = randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    hidden[1] = True
    with torch.no_grad():
        y = ens(x, x, x, key_padding_mask=hidden, need_weights=need_weights)[0]
        for i, model in enumerate(models):
            want = model(x, x, x, key_padding_mask=hidden, need_weights=need_weights)[0]
            torch.testing.assert_close(y[i], want, equal_nan=True)


@pytest.mark.parametrize("randomness", ["different", "same", "error"])
def test_attention_drops_other_weights_for_each_member(randomness: str) -> None:
    def attend(w: Tensor, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x * w, x * w, x, dropout_p=0.5)

    ens, _ = build(lambda: Call(attend, 1), randomness=randomness)
    with torch.no_grad():
        ens.members.w.fill_(1.0)
    x = randn(2, 6, 4)
    if randomness == "error":
        before = torch.get_rng_state()
        with pytest.raises(RuntimeError, match="random"):
            ens.eval()(x)
        assert torch.equal(torch.get_rng_state(), before)
        return
    y = ens(x)
    assert torch.equal(y[0], y[1]) == (randomness == "same")
    exact = F.scaled_dot_product_attention(x, x, x)
    mean = torch.stack([ens(x) for _ in range(400)]).mean((0, 1))
    torch.testing.assert_close(mean, exact, atol=0.25, rtol=0)


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_a_layer_that_runs_member_by_member_draws_as_asked(randomness: str) -> None:
    ens, _ = build(lambda: nn.LSTM(3, 4, 2, dropout=0.5), training=True, randomness=randomness)
    with torch.no_grad():
        for parameter in ens.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    y, _ = ens(randn(5, 2, 3))
    assert torch.equal(y[0], y[1]) == (randomness == "same")


def _written(w: Tensor, x: Tensor) -> Tensor:
    y = x * w
    y.clamp_(max=2.0).masked_fill_(x > 1, y.sum().detach()).tril_()
    return y.pow_(torch.tensor(2.0))  # no batching rule, and backward needs what was there before


def test_ops_that_write_are_differentiated_and_run_for_all_members() -> None:
    ens, models = build(lambda: Call(_written, 1))
    x = randn(N, 4, 4)
    y = ens(per_member(x))
    want = torch.stack([model(x[i]) for i, model in enumerate(models)])
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(ens.members.w.grad, torch.stack([m.w.grad for m in models]))


def test_a_table_of_limited_norm_is_written_in_place() -> None:
    ens, models = build(lambda: nn.Embedding(7, 3, max_norm=0.5), training=True)
    before, ids = ens.members.weight, torch.tensor([1, 2, 2])
    torch.testing.assert_close(ens(ids), torch.stack([model(ids) for model in models]))
    assert ens.members.weight is before
    torch.testing.assert_close(before.detach(), torch.stack([m.weight.detach() for m in models]))


def test_other_users_of_vmap_get_torchs_own_loop() -> None:
    """Another thread's vmap, also while a call of ours runs, is not touched by the list."""
    seen: list[Any] = []

    def others() -> None:
        with pytest.warns(UserWarning, match="performance drop"):
            seen.append(torch.vmap(torch.bilinear, (0, None, None, None))(*arguments))

    arguments = randn(2, 3, 4), randn(3, 5), randn(2, 4, 5), None

    def forward(w: Tensor, x: Tensor) -> Tensor:
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()
        return x * w

    ens, _ = build(lambda: Call(forward, 1))
    ens(randn(2))
    expected = [torch.bilinear(x, *arguments[1:]) for x in arguments[0]]
    torch.testing.assert_close(seen[0], torch.stack(expected))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        lambda: nn.Sequential(nn.Conv1d(5, 4, 1), nn.GroupNorm(2, 4), nn.ConvTranspose1d(4, 2, 2)),
        lambda: nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
    ],
    ids=["native", "convolutions", "linear"],
)
def test_autocast_casts_what_it_casts_in_a_member(make: Any) -> None:
    models = [make().eval() for _ in range(N)]
    ens, x = Ensemble(copy.deepcopy(models), strategy="fused"), torch.randn(4, 5, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, want = ens(x), torch.stack([model(x) for model in models])
    torch.testing.assert_close(y, want, rtol=5e-2, atol=5e-2)


def test_parameters_of_another_type_leave_the_type_of_the_output() -> None:
    ens = Ensemble([nn.LayerNorm(8) for _ in range(N)], strategy="fused")
    assert ens(torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


class Strides(TorchDispatchMode):
    """The strides of the gradients that reach ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "threshold_backward":
            self.found.append(args[0].stride())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_gradient_of_a_mean_over_all_positions_has_no_order_of_its_own(dims: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]

    def make() -> nn.Module:
        return nn.Sequential(conv(2, 4, 3), nn.Identity(), nn.ReLU(), pool(1), nn.Flatten())

    ens, members = build(make, training=True)
    x = torch.randn(3, 2, *[7] * dims, dtype=torch.float64)
    with Strides() as seen:
        ens(x).square().sum().backward()
    assert [stride[-dims:] for stride in seen.found] == [(0,) * dims]
    plain = [F.relu(member[0](x)).flatten(2).mean(-1) for member in members]
    torch.stack(plain).square().sum().backward()
    weights = torch.stack([member[0].weight.grad for member in members])
    torch.testing.assert_close(ens.members.get_parameter("0.weight").grad, weights)


def test_a_mean_of_halves_is_torchs_own() -> None:
    # Their sum is out of range: 64 * 2048 > 65504.
    ens = Ensemble([nn.AdaptiveAvgPool2d(1) for _ in range(N)], strategy="fused")
    x = torch.full((2, 3, 8, 8), 2048.0, dtype=torch.float16, requires_grad=True)
    assert torch.equal(ens(x), torch.full((N, 2, 3, 1, 1), 2048.0, dtype=torch.float16))
