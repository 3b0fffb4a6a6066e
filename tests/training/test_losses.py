"""`member_losses` against the obvious loop: the loss function called once for each member."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions import Normal
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from unisono import Ensemble, per_member
from unisono.engine.inputs import PerMember
from unisono.engine.tree import leaves, tree_map
from unisono.errors import EnsembleWarning
from unisono.training import any_loss
from unisono.training.folded_losses import folded_losses
from unisono.training.losses import member_losses

N, B, C = 4, 6, 5
F64 = torch.float64


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(any_loss, "_ways", {})


class Count(TorchDispatchMode):
    """How many ops run inside, and which."""

    def __init__(self):
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def loop(loss_fn, outputs, targets) -> Tensor:
    """The truth: one call for each member, on its own part."""
    n = next(len(leaf) for _, leaf in leaves(outputs) if isinstance(leaf, Tensor))

    def part(i):
        def of(leaf):
            if isinstance(leaf, PerMember):
                return tree_map(lambda t: t[i] if isinstance(t, Tensor) else t, leaf.tree)
            return leaf

        return of

    return torch.stack(
        [
            loss_fn(
                tree_map(lambda t, i=i: t[i] if isinstance(t, Tensor) else t, outputs),
                tree_map(part(i), targets),
            ).reshape(())
            for i in range(n)
        ]
    )


def own(outputs):
    """Copies that get gradients of their own."""
    return tree_map(lambda t: t.detach().clone().requires_grad_(), outputs)


def assert_equal_to_loop(loss_fn, outputs, targets) -> Tensor:
    """Losses, and gradients of a sum in which each member has another weight."""
    mine, theirs = own(outputs), own(outputs)
    got, want = member_losses(loss_fn, mine, targets), loop(loss_fn, theirs, targets)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)
    weights = torch.linspace(0.5, 2.0, len(want), dtype=want.dtype)
    (got * weights).sum().backward()
    (want * weights).sum().backward()
    for (_, a), (_, b) in zip(leaves(mine), leaves(theirs), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    return got


class Row(NamedTuple):
    """A loss with one member's output and target as functions, and how many ops it may take."""

    loss_fn: Callable[..., Any]
    output: Callable[[], Any]
    target: Callable[[], Any]
    folded: bool = True


def normal(*shape):
    return lambda: torch.randn(shape, dtype=F64)


def uniform(*shape):
    return lambda: torch.rand(shape, dtype=F64)


def labels(*shape, high=C):
    return lambda: torch.randint(high, shape)


def some_ignored(*shape, ignore_index=-100):
    def make():
        y = torch.randint(C, shape)
        y.view(-1)[::3] = ignore_index
        return y

    return make


def soft(*shape):
    return lambda: torch.rand(*shape, dtype=F64).softmax(1)


def log_probabilities(*shape):
    return lambda: torch.randn(*shape, dtype=F64).log_softmax(1)


WEIGHT = torch.linspace(0.5, 2.0, C, dtype=F64)
PIXELS = (B, C, 3, 2)


def own_loss(output, target):
    """What a user writes."""
    error = (output - target).square().sum(-1)
    return torch.where(error > 1, error.sqrt(), error).mean() + 0.01 * output.abs().max()


def by_values(output, target):
    """Its Python code depends on the numbers, and differently for the members."""
    error = (output - target).abs().mean()
    return error * 2 if error > 1.1 else error


def gaussian(output, target, **options):
    return F.gaussian_nll_loss(output[0], target, output[1], **options)


class Quantile(nn.Module):
    """A loss module of the user's own, with a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("levels", torch.tensor([0.1, 0.5, 0.9], dtype=F64))

    def forward(self, output, target):
        error = target - output
        return torch.maximum(self.levels * error, (self.levels - 1) * error).mean()


REDUCED = ("mean", "sum")
ROWS = {
    **{
        f"mse-{r}": Row(partial(F.mse_loss, reduction=r), normal(B, 2), normal(B, 2))
        for r in REDUCED
    },
    "mse-module": Row(nn.MSELoss(), normal(B, 2), normal(B, 2)),
    "mse-sum-module": Row(nn.MSELoss(reduction="sum"), normal(B, 2), normal(B, 2)),
    "mse-flat": Row(F.mse_loss, normal(B), normal(B)),
    "mse-number": Row(F.mse_loss, normal(), normal()),
    "mse-weight": Row(
        partial(F.mse_loss, weight=torch.rand(B, 2)), normal(B, 2), normal(B, 2), False
    ),
    **{
        f"l1-{r}": Row(partial(F.l1_loss, reduction=r), normal(B, 2), normal(B, 2)) for r in REDUCED
    },
    "l1-module": Row(nn.L1Loss(), normal(B, 2), normal(B, 2)),
    "huber": Row(F.huber_loss, normal(B, 1), normal(B, 1)),
    "huber-delta": Row(nn.HuberLoss(delta=0.3), normal(B, 1), normal(B, 1)),
    "huber-sum": Row(partial(F.huber_loss, delta=0.3, reduction="sum"), normal(B), normal(B)),
    "smooth-l1": Row(F.smooth_l1_loss, normal(B, 1), normal(B, 1)),
    "smooth-l1-beta": Row(nn.SmoothL1Loss(beta=0.2), normal(B, 1), normal(B, 1)),
    "smooth-l1-zero": Row(partial(F.smooth_l1_loss, beta=0.0), normal(B, 1), normal(B, 1)),
    "bce": Row(F.binary_cross_entropy, uniform(B, 3), uniform(B, 3)),
    "bce-logits": Row(F.binary_cross_entropy_with_logits, normal(B, 3), uniform(B, 3)),
    "bce-logits-weights": Row(
        nn.BCEWithLogitsLoss(weight=torch.rand(B, 1, dtype=F64), pos_weight=WEIGHT[:3]),
        normal(B, 3),
        uniform(B, 3),
    ),
    "bce-logits-sum": Row(
        nn.BCEWithLogitsLoss(pos_weight=WEIGHT, reduction="sum"), normal(B, C), uniform(B, C)
    ),
    "ce": Row(F.cross_entropy, normal(B, C), labels(B)),
    "ce-many-classes": Row(F.cross_entropy, normal(B, 19), labels(B, high=19)),
    "ce-module": Row(nn.CrossEntropyLoss(), normal(B, C), labels(B)),
    "ce-sum": Row(nn.CrossEntropyLoss(reduction="sum"), normal(B, C), labels(B)),
    "ce-weight": Row(nn.CrossEntropyLoss(WEIGHT), normal(B, C), labels(B)),
    "ce-ignored": Row(nn.CrossEntropyLoss(WEIGHT), normal(B, C), some_ignored(B)),
    "ce-ignored-class": Row(
        partial(F.cross_entropy, ignore_index=2), normal(B, C), some_ignored(B, ignore_index=2)
    ),
    "ce-smooth": Row(partial(F.cross_entropy, label_smoothing=0.1), normal(B, C), labels(B)),
    "ce-all": Row(
        nn.CrossEntropyLoss(WEIGHT, ignore_index=1, label_smoothing=0.2),
        normal(B, C),
        some_ignored(B, ignore_index=1),
    ),
    "ce-all-sum": Row(
        nn.CrossEntropyLoss(WEIGHT, ignore_index=1, label_smoothing=0.2, reduction="sum"),
        normal(B, C),
        some_ignored(B, ignore_index=1),
    ),
    "ce-soft": Row(F.cross_entropy, normal(B, C), soft(B, C)),
    "ce-soft-weight": Row(
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), normal(B, C), soft(B, C)
    ),
    "ce-soft-sum": Row(partial(F.cross_entropy, reduction="sum"), normal(B, C), soft(B, C)),
    "ce-pixels": Row(F.cross_entropy, normal(*PIXELS), labels(B, 3, 2)),
    "ce-pixels-all": Row(
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), normal(*PIXELS), some_ignored(B, 3, 2)
    ),
    "ce-pixels-soft": Row(F.cross_entropy, normal(*PIXELS), soft(*PIXELS)),
    "ce-one": Row(F.cross_entropy, normal(C), labels()),
    "nll": Row(F.nll_loss, log_probabilities(B, C), labels(B)),
    "nll-weight": Row(nn.NLLLoss(WEIGHT), log_probabilities(B, C), some_ignored(B)),
    "nll-sum": Row(partial(F.nll_loss, reduction="sum"), log_probabilities(B, C), labels(B)),
    "nll-pixels": Row(nn.NLLLoss(WEIGHT), log_probabilities(*PIXELS), some_ignored(B, 3, 2)),
    "gaussian": Row(gaussian, lambda: (normal(B, 2)(), uniform(B, 2)()), normal(B, 2), False),
    "gaussian-full-sum": Row(
        partial(gaussian, full=True, reduction="sum"),
        lambda: (normal(B, 2)(), uniform(B, 2)()),
        normal(B, 2),
        False,
    ),
    "gaussian-one-variance": Row(
        gaussian, lambda: (normal(B, 2)(), uniform(B, 1)()), normal(B, 2), False
    ),
    "gaussian-short": Row(gaussian, lambda: (normal(B, 2)(), uniform(B)()), normal(B, 2), False),
    "gaussian-number": Row(
        lambda out, y: F.gaussian_nll_loss(out, y, 0.5), normal(B, 2), normal(B, 2), False
    ),
    "kl": Row(nn.KLDivLoss(reduction="batchmean"), log_probabilities(B, C), soft(B, C), False),
    "poisson": Row(nn.PoissonNLLLoss(), normal(B, 2), uniform(B, 2), False),
    "soft-margin": Row(F.soft_margin_loss, normal(B, 2), lambda: normal(B, 2)().sign(), False),
    "multi-margin": Row(nn.MultiMarginLoss(weight=WEIGHT), normal(B, C), labels(B), False),
    "own": Row(own_loss, normal(B, 2), normal(B, 2), False),
    "own-module": Row(Quantile(), normal(B, 3), normal(B, 1), False),
    "one-element": Row(
        lambda out, y: F.mse_loss(out, y).reshape(1, 1), normal(B, 2), normal(B, 2), False
    ),
}


def stacked(make: Callable[[], Any], n: int = N) -> Any:
    trees = [make() for _ in range(n)]
    if isinstance(trees[0], tuple):
        return tuple(torch.stack(column) for column in zip(*trees, strict=True))
    return torch.stack(trees)


@pytest.mark.parametrize("whose", ["shared", "per-member"])
@pytest.mark.parametrize("name", ROWS)
def test_losses_and_gradients_equal_the_loop(name, whose):
    row = ROWS[name]
    outputs = stacked(row.output)
    targets = per_member(stacked(row.target)) if whose == "per-member" else row.target()
    assert_equal_to_loop(row.loss_fn, outputs, targets)
    found = folded_losses(row.loss_fn, outputs, targets, N)
    assert (found is not None) == row.folded


@pytest.mark.parametrize("whose", ["shared", "per-member"])
@pytest.mark.parametrize("name", ROWS)
def test_the_number_of_ops_does_not_grow_with_the_members(name, whose):
    row = ROWS[name]
    counts = []
    for n in (3, 7):
        outputs = own(stacked(row.output, n))
        targets = per_member(stacked(row.target, n)) if whose == "per-member" else row.target()
        member_losses(row.loss_fn, outputs, targets)  # which way it can run is known from now on
        with Count() as count:
            member_losses(row.loss_fn, outputs, targets).sum().backward()
        counts.append(count.ops)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("name", "limit"),
    {
        "mse-mean": 3,
        "l1-mean": 4,
        "huber": 3,
        "smooth-l1": 3,
        "bce-logits": 3,
        "ce": 20,
        "nll": 12,
    }.items(),
)
def test_known_losses_take_a_few_ops(name, limit):
    row = ROWS[name]
    outputs, target = stacked(row.output, 20), row.target()
    with Count() as count:
        member_losses(row.loss_fn, outputs, target)
    assert len(count.ops) <= limit, count.ops


@pytest.mark.parametrize("name", ROWS)
def test_a_members_data_change_only_its_own_loss_and_gradient(name):
    row, j = ROWS[name], 2
    outputs, targets = stacked(row.output), stacked(row.target)

    def run(outputs, targets):
        mine = own(outputs)
        losses = member_losses(row.loss_fn, mine, per_member(targets))
        losses.sum().backward()
        return [losses.detach(), *(leaf.grad for _, leaf in leaves(mine))]

    before = run(outputs, targets)
    fresh_output, fresh_target = row.output(), row.target()
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    fresh = fresh_output if isinstance(outputs, tuple) else (fresh_output,)
    for part, value in zip(parts, fresh, strict=True):
        part[j] = value
    targets[j] = fresh_target
    after = run(outputs, targets)
    others = [i for i in range(N) if i != j]
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a[others], b[others], rtol=0, atol=0)
    assert not torch.equal(before[0][j], after[0][j])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5),
    shape=st.lists(st.integers(0, 4), max_size=3),
    marked=st.booleans(),
    reduction=st.sampled_from(REDUCED),
)
def test_elementwise_losses_at_any_shape(n, shape, marked, reduction):
    outputs = torch.randn(n, *shape, dtype=F64)
    y = torch.randn(n, *shape, dtype=F64) if marked else torch.randn(shape, dtype=F64)
    targets = per_member(y) if marked else y
    loss_fn = partial(F.huber_loss, reduction=reduction)
    got, want = member_losses(loss_fn, outputs, targets), loop(loss_fn, outputs, targets)
    torch.testing.assert_close(got, want, equal_nan=True)  # the mean of nothing


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    batch=st.integers(1, 4),
    classes=st.integers(1, 20),
    space=st.lists(st.integers(1, 3), max_size=2),
    marked=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1]),
)
def test_cross_entropy_at_any_shape(n, batch, classes, space, marked, smoothing):
    outputs = torch.randn(n, batch, classes, *space, dtype=F64)
    y = torch.randint(classes, (n, batch, *space) if marked else (batch, *space))
    loss_fn = nn.CrossEntropyLoss(label_smoothing=smoothing, ignore_index=0)
    targets = per_member(y) if marked else y
    got, want = member_losses(loss_fn, outputs, targets), loop(loss_fn, outputs, targets)
    torch.testing.assert_close(got, want, equal_nan=True)  # where all targets are ignored


@dataclass
class Prediction:
    mean: Tensor
    name: str
    extra: dict[str, Tensor]


def test_outputs_come_as_the_model_returns_them():
    outputs = Prediction(torch.randn(N, B, 2), "a", {"scale": torch.rand(N, B, 1)})
    targets = {"y": per_member(torch.randn(N, B, 2)), "weight": torch.rand(B, 1), "p": 1.5}

    def loss_fn(output, target):
        assert type(output) is Prediction
        assert (output.name, target["p"]) == ("a", 1.5)
        error = (output.mean - target["y"]).abs() ** target["p"] / output.extra["scale"]
        return (target["weight"] * error).mean()

    got = member_losses(loss_fn, outputs, targets)
    want = torch.stack(
        [
            loss_fn(
                Prediction(outputs.mean[i], "a", {"scale": outputs.extra["scale"][i]}),
                {**targets, "y": targets["y"].tree[i]},
            )
            for i in range(N)
        ]
    )
    torch.testing.assert_close(got, want)


def test_distributions_as_outputs():
    outputs = Normal(torch.randn(N, B, 2), torch.rand(N, B, 2) + 0.1)
    y = torch.randn(B, 2)
    got = member_losses(lambda d, y: -d.log_prob(y).mean(), outputs, y)
    want = [-Normal(outputs.loc[i], outputs.scale[i]).log_prob(y).mean() for i in range(N)]
    torch.testing.assert_close(got, torch.stack(want))


def test_no_targets():
    outputs = torch.randn(N, B, dtype=F64)
    got = member_losses(lambda output, _: output.square().mean(), outputs, None)
    torch.testing.assert_close(got, outputs.square().mean(1))


def test_a_loss_that_is_the_same_for_all_members():
    got = member_losses(lambda output, y: y.sum(), torch.randn(N, B), torch.ones(B))
    torch.testing.assert_close(got, torch.full((N,), float(B)))


def test_training_on_the_sum_is_training_alone():
    models = [nn.Linear(3, C).double() for _ in range(N)]
    ens = Ensemble(models)
    x, y = torch.randn(B, 3, dtype=F64), torch.randint(C, (B,))
    member_losses(F.cross_entropy, ens(x), y).sum().backward()
    for i, model in enumerate(models):
        F.cross_entropy(model(x), y).backward()
        torch.testing.assert_close(ens.members.weight.grad[i], model.weight.grad)


# --- dtypes, autocast, transforms, devices ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mse-mean", "l1-mean", "huber", "bce-logits", "ce", "ce-pixels"])
def test_half_precision_as_the_loop(name, dtype):
    row = ROWS[name]
    outputs, target = stacked(row.output).to(dtype), row.target()
    target = target.to(dtype) if target.is_floating_point() else target
    got, want = member_losses(row.loss_fn, outputs, target), loop(row.loss_fn, outputs, target)
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_many_half_precision_losses_do_not_overflow():
    outputs = torch.randn(2, 80_000, 3, dtype=torch.float16)
    target = torch.randint(3, (80_000,))
    want = F.cross_entropy(outputs.float().flatten(0, 1), target.repeat(2))
    for loss_fn in (F.cross_entropy, lambda output, y: F.cross_entropy(output, y)):
        got = member_losses(loss_fn, outputs, target)
        assert got.dtype is torch.float16
        torch.testing.assert_close(got.float().mean(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["mse-mean", "ce", "nll", "bce-logits", "own", "gaussian"])
def test_autocast_as_the_loop(name):
    row = ROWS[name]
    outputs = tree_map(lambda t: t.bfloat16(), stacked(row.output))
    target = row.target()
    target = target.float() if target.is_floating_point() else target
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = member_losses(row.loss_fn, outputs, target), loop(row.loss_fn, outputs, target)
    assert got.dtype is want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["mse-mean", "ce", "own", "gaussian"])
def test_inside_torch_func_grad(name):
    row = ROWS[name]
    outputs, target = stacked(row.output), row.target()
    got = torch.func.grad(lambda o: member_losses(row.loss_fn, o, target).sum())(outputs)
    mine = own(outputs)
    loop(row.loss_fn, mine, target).sum().backward()
    for (_, a), (_, b) in zip(leaves(got), leaves(mine), strict=True):
        torch.testing.assert_close(a, b.grad)


@pytest.mark.parametrize("name", ["mse-mean", "ce", "own"])
def test_second_derivatives(name):
    row = ROWS[name]
    outputs, target = stacked(row.output), row.target()
    assert torch.autograd.gradgradcheck(
        lambda o: member_losses(row.loss_fn, o, target), (outputs.requires_grad_(),)
    )


@pytest.mark.parametrize("name", [n for n, row in ROWS.items() if "gaussian" not in n])
@torch.no_grad()
def test_losses_stay_on_the_device_and_never_wait(name):
    row = ROWS[name]
    mode = FakeTensorMode()

    def fake(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        return FakeTensor(mode, torch.empty_like(leaf, device="meta"), torch.device("cuda", 0))

    loss_fn = row.loss_fn
    if isinstance(loss_fn, partial):
        loss_fn = partial(loss_fn.func, **{k: fake(v) for k, v in loss_fn.keywords.items()})
    elif isinstance(loss_fn, nn.Module):
        loss_fn = type(loss_fn).__new__(type(loss_fn))
        vars(loss_fn).update(vars(row.loss_fn))
        vars(loss_fn)["_buffers"] = {k: fake(v) for k, v in row.loss_fn._buffers.items()}
    outputs, target = tree_map(fake, stacked(row.output)), fake(row.target())
    with mode:
        try:
            losses = member_losses(loss_fn, outputs, target)
        except (EnsembleWarning, RuntimeError) as error:
            if row.folded or "not linked with support for cuda" not in str(error):
                raise
            pytest.skip("torch can't index fake tensors without CUDA")
    assert losses.device.type == "cuda"
    assert losses.shape == (N,)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["mse-mean", "nn-ce", "own"])
def test_torch_compile(name):
    row = ROWS[{"nn-ce": "ce-module"}.get(name, name)]
    outputs, target = stacked(row.output), row.target()
    run = torch.compile(
        lambda o, y: member_losses(row.loss_fn, o, y), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(run(outputs, target), loop(row.loss_fn, outputs, target))


def test_activation_checkpointing_around_the_loss():
    from torch.utils.checkpoint import checkpoint

    outputs, target = own(torch.randn(N, B, 2, dtype=F64)), torch.randn(B, 2, dtype=F64)
    for loss_fn in (F.mse_loss, own_loss):
        outputs.grad = None
        losses = checkpoint(
            lambda o, f=loss_fn: member_losses(f, o, target), outputs, use_reentrant=False
        )
        losses.sum().backward()
        mine = own(outputs)
        loop(loss_fn, mine, target).sum().backward()
        torch.testing.assert_close(outputs.grad, mine.grad)


# --- what can't run at once ---


def test_a_loss_that_depends_on_values_runs_by_loop_and_says_so_once():
    scale = torch.linspace(0.1, 3, N, dtype=F64)[:, None, None]
    outputs, target = torch.randn(N, B, 2, dtype=F64) * scale, torch.randn(B, 2, dtype=F64)
    with pytest.warns(EnsembleWarning, match="by_values") as caught:
        assert_equal_to_loop(by_values, outputs, target)
    assert len(caught) == 1
    line = by_values.__code__.co_firstlineno
    assert str(caught[0].message) == (
        f"member_losses: `by_values` (test_losses.py:{line}) can't be computed for all 4 members at"
        " once, so from now on it runs for one member after another."
        "\n  reason: RuntimeError: vmap: It looks like you're attempting to use a Tensor in some"
        " data-dependent control flow"
        "\n  remedy: keep it a tensor: torch.where(condition, a, b) instead of `if`, and no .item()"
        " or .tolist(); torch.stack([loss_fn(output, target) for output in outputs]) is the loop,"
        " and says nothing"
    )
    assert caught[0].filename == __file__
    losses = member_losses(by_values, outputs, target)  # the second time: no warning, an error here
    assert len({bool(v > 1.1) for v in losses}) == 2, "all members went the same way"


def test_random_numbers_are_drawn_once_also_where_it_falls_back():
    def noisy(output, target):
        noise = torch.randn_like(output)
        return ((output + noise - target) ** 2).mean() * (2 if output.sum() > 0 else 1)

    outputs, target = torch.randn(N, B), torch.randn(B)
    torch.manual_seed(3)
    want = loop(noisy, outputs, target)
    torch.manual_seed(3)
    with pytest.warns(EnsembleWarning, match="`noisy`"):
        got = member_losses(noisy, outputs, target)
    torch.testing.assert_close(got, want)


def test_backward_hooks_of_a_loss_module_see_one_member_each():
    loss_fn, seen = Quantile(), []
    loss_fn.register_full_backward_hook(lambda module, before, after: seen.append(after[0].shape))
    outputs = torch.randn(N, B, 3, dtype=F64, requires_grad=True)
    with pytest.warns(EnsembleWarning, match="Quantile has a backward hook"):
        losses = member_losses(loss_fn, outputs, torch.randn(B, 1, dtype=F64))
    losses.sum().backward()
    assert seen == [()] * N


def test_hooks_and_subclasses_of_known_modules_are_not_passed_over():
    class Doubled(nn.MSELoss):
        def forward(self, input, target):
            return 2 * super().forward(input, target)

    hooked = nn.MSELoss()
    hooked.register_forward_hook(lambda module, args, loss: 2 * loss)
    replaced = nn.MSELoss()
    replaced.forward = lambda output, y: 2 * F.mse_loss(output, y)
    outputs, target = torch.randn(N, B), torch.randn(B)
    want = 2 * loop(F.mse_loss, outputs, target)
    for loss_fn in (Doubled(), hooked, replaced):
        torch.testing.assert_close(member_losses(loss_fn, outputs, target), want)


# --- wrong inputs ---


def test_targets_that_broadcast_warn_as_a_member_does_and_once():
    outputs, target = torch.randn(N, B, 1), torch.randn(B)
    match = r"target size \(torch.Size\(\[6\]\)\) that is different to the input size"
    with pytest.warns(UserWarning, match=match) as caught:
        got = member_losses(F.mse_loss, outputs, target)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(got, loop(F.mse_loss, outputs, target))


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (torch.randn(N, B, 2), torch.randn(2)),
        (torch.randn(N, N, 1), torch.randn(N)),
        (torch.randn(N, N, 1), per_member(torch.randn(N, N))),
        (torch.randn(N, N), per_member(torch.randn(N, N, 1))),
    ],
)
@pytest.mark.parametrize("loss_fn", [F.mse_loss, nn.L1Loss(), F.huber_loss])
def test_shapes_that_broadcast_do_so_within_a_member(loss_fn, outputs, targets):
    with pytest.warns(UserWarning, match="that is different to the input size"):
        got = member_losses(loss_fn, outputs, targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(got, loop(loss_fn, outputs, targets))


def test_a_weight_with_more_axes_than_the_outputs_does_not_meet_the_members():
    loss_fn = partial(F.binary_cross_entropy_with_logits, pos_weight=torch.rand(N, B, dtype=F64))
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        member_losses(loss_fn, torch.randn(N, B, dtype=F64), torch.rand(B, dtype=F64))


def test_gaussian_targets_that_broadcast_do_so_within_a_member():
    outputs = torch.randn(N, N, 1, dtype=F64), torch.rand(N, N, 1, dtype=F64)
    with pytest.warns(EnsembleWarning, match="data-dependent control flow"):
        assert_equal_to_loop(gaussian, outputs, torch.randn(N, dtype=F64))


def test_shapes_that_do_not_fit_are_those_of_one_member():
    with pytest.raises(ValueError, match=r"Expected input batch_size \(6\) to match") as caught:
        member_losses(F.cross_entropy, torch.randn(N, B, C), torch.randint(C, (B + 1,)))
    line = F.cross_entropy.__code__.co_firstlineno
    assert "\n".join(caught.value.__notes__) == (
        f"member_losses: raised by `cross_entropy` (functional.py:{line}) for member 0:"
        " output (6, 5) float32, target (7,) int64"
    )


def test_an_unmarked_target_of_each_member_gets_the_hint():
    with pytest.raises((ValueError, RuntimeError), match=r"batch_size|target") as caught:
        member_losses(F.cross_entropy, torch.randn(N, B, C), torch.randint(C, (N, B)))
    assert caught.value.__notes__[0].endswith(
        "\ntargets (4, 6) int64 is seen whole by every member; if axis 0 is the member:"
        " member_losses(loss_fn, outputs, per_member(targets))"
    )


def test_a_negative_variance_of_one_member():
    mean, variance = torch.zeros(N, B), torch.ones(N, B)
    variance[2, 1] = -1.0
    with pytest.raises(ValueError, match="var has negative entry") as caught:
        member_losses(gaussian, (mean, variance), torch.zeros(B))
    assert "for member 2: output[0] (6,) float32, output[1] (6,)" in caught.value.__notes__[0]


def test_a_label_out_of_range():
    with pytest.raises(IndexError, match="Target 9 is out of bounds"):
        member_losses(F.cross_entropy, torch.randn(N, B, C), torch.full((B,), 9))


@pytest.mark.parametrize("way", ["at once", "loop"])
def test_more_than_one_number(way):
    def many(output, target):
        if way == "loop":
            bool(output.sum() > 0)
        return (output - target).square()

    line = many.__code__.co_firstlineno
    with pytest.raises(ValueError, match="one number") as caught:
        member_losses(many, torch.randn(N, B), torch.randn(B))
    assert str(caught.value) == (
        f"member_losses: `many` (test_losses.py:{line}) returns a tensor of shape (6,) for each"
        " member, but the loss of a member is one number; use reduction='mean', or"
        " lambda output, target: loss_fn(output, target).mean()"
    )


def test_no_reduction():
    with pytest.raises(ValueError, match=r"`MSELoss` returns a tensor of shape \(6,\) for each"):
        member_losses(nn.MSELoss(reduction="none"), torch.randn(N, B), torch.randn(B))


@pytest.mark.parametrize(
    ("returns", "kind"),
    [
        (lambda output, y: F.mse_loss(output, y).item(), "float"),
        (lambda output, y: (F.mse_loss(output, y), output), "tuple"),
    ],
)
def test_what_is_no_tensor(returns, kind):
    with pytest.raises(TypeError, match=rf"returns a {kind}, but the loss of a member is a tensor"):
        member_losses(returns, torch.randn(N, B), torch.randn(B))


def test_outputs_without_members():
    with pytest.raises(ValueError, match="axis 0 of every output is the member") as caught:
        member_losses(own_loss, {"a": torch.zeros(3, 2), "b": torch.zeros(4)}, None)
    assert "\n  outputs['a']: (3, 2)\n  outputs['b']: (4,)\n" in str(caught.value)
    for none in (torch.zeros(0, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="axis 0 of every output is the member"):
            member_losses(F.mse_loss, none, torch.zeros(3))
    with pytest.raises(TypeError, match="but it holds no tensor: list"):
        member_losses(F.mse_loss, [1.0], torch.zeros(3))


def test_marked_targets_of_another_number_of_members():
    targets = {"a": per_member(torch.zeros(3, B)), "b": [per_member(torch.tensor(1.0))]}
    with pytest.raises(ValueError, match="outputs are those of 4 members") as caught:
        member_losses(lambda output, y: output.sum(), torch.zeros(N, B), targets)
    assert "\n  targets['a'] has shape (3, 6)\n  targets['b'][0] has shape ()\n" in str(
        caught.value
    )
    with pytest.raises(ValueError, match="targets is marked twice"):
        member_losses(F.mse_loss, torch.zeros(N, B), per_member(per_member(torch.zeros(N, B))))


def test_no_function():
    with pytest.raises(TypeError, match="loss_fn is a function"):
        member_losses("mse", torch.zeros(N, B), torch.zeros(B))


def test_what_is_remembered_is_bounded(monkeypatch):
    monkeypatch.setattr(any_loss, "_MOST", 3)
    for k in range(8):
        scope: dict[str, Any] = {}
        exec(f"def loss(output, target): return (output - target).abs().mean() * {k}", scope)
        member_losses(scope["loss"], torch.zeros(N, B), torch.ones(B))
        assert len(any_loss._ways) <= 3
