"""nn.Linear in a template calls its rule directly, and only where nobody could notice."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from unisono import Ensemble, per_member
from unisono.engine import leaf
from unisono.engine.steps import STEPS, layers


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
    monkeypatch.setattr(layers, "linear", by_rule)
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


# Chains of layers


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*copy.deepcopy(layers)).double()


CHAINS = {
    "linear and activations": chain(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2), nn.Sigmoid()
    ),
    "activations behind each other": chain(
        nn.Linear(4, 6), nn.ReLU(), nn.Tanh(), nn.Linear(6, 2), nn.Sigmoid(), nn.ReLU()
    ),
    "an activation first": chain(nn.ReLU(), nn.Linear(4, 2)),
    "activations only": chain(nn.Tanh(), nn.ReLU()),
    "other layers between": chain(
        nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2)
    ),
    "in each other": chain(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 2)),
    "in place by itself": chain(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per member"])
def test_a_chain_equals_the_loop(name: str, shared: bool) -> None:
    models = [CHAINS[name]() for _ in range(3)]
    for model in models:
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    ens = Ensemble(models, strategy="fused")
    xs = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    given = xs[0].detach().clone().requires_grad_() if shared else xs
    outputs = ens(given if shared else per_member(given))
    expected = torch.stack([m(given if shared else given[i]) for i, m in enumerate(models)])
    torch.testing.assert_close(outputs, expected)
    weights = torch.randn_like(expected)
    (mine,) = torch.autograd.grad(outputs, given, weights, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, given, weights, retain_graph=True)
    torch.testing.assert_close(mine, theirs)
    if list(ens.parameters()):
        (outputs * weights).sum().backward()
        (expected * weights).sum().backward()
        oracles.assert_gradients_equal(ens, models)


class Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
def test_activations_between_layers_are_in_place(grad: bool) -> None:
    models = [CHAINS["linear and activations"]() for _ in range(3)]
    ens = Ensemble(models, strategy="fused")
    with torch.set_grad_enabled(grad), Recording() as mode:
        ens(X.double())
    assert [op for op in mode.ops if op in ("relu_", "tanh_", "sigmoid_")] == [
        "relu_", "tanh_", "sigmoid_"
    ]  # fmt: skip
    assert not {"relu", "tanh", "sigmoid"} & set(mode.ops)


class Block(nn.Sequential):
    """Chooses layers and does nothing else, as torchvision's `Conv2dNormActivation`."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh())


class Residual(Block):
    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input)


class Reversed(Block):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self[k] for k in (2, 3, 0, 1)])


class Doubling(Block):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().__call__(*args, **kwargs)


@pytest.mark.parametrize("inner", [True, False], ids=["in another", "alone"])
def test_a_sequential_that_only_chooses_layers_is_a_chain(inner: bool) -> None:
    models = [nn.Sequential(nn.Identity(), Block(4)) if inner else Block(4) for _ in range(3)]
    with torch.no_grad(), Recording() as mode:
        found = Ensemble(models, strategy="fused")(X)
        expected = torch.stack([model(X) for model in models])
    torch.testing.assert_close(found, expected)
    assert [op for op in mode.ops if op in ("relu_", "tanh_")] == ["relu_", "tanh_"]


@pytest.mark.parametrize("kind", [Residual, Reversed, Doubling])
@pytest.mark.parametrize("inner", [True, False], ids=["in another", "alone"])
def test_a_sequential_with_a_forward_of_its_own_keeps_it(kind: type[Block], inner: bool) -> None:
    models = [nn.Sequential(nn.Identity(), kind(4)) if inner else kind(4) for _ in range(3)]
    with torch.no_grad():
        found = Ensemble(models, strategy="fused")(X)
        torch.testing.assert_close(found, torch.stack([model(X) for model in models]))


def test_the_input_is_never_written_to() -> None:
    models = [CHAINS["an activation first"]() for _ in range(3)]
    xs = torch.randn(3, 5, 4, dtype=torch.float64)
    before = xs.clone()
    Ensemble(models, strategy="fused")(per_member(xs))
    assert torch.equal(xs, before)


def test_a_hook_on_a_layer_sees_what_the_layer_returned() -> None:
    models = [CHAINS["linear and activations"]() for _ in range(3)]
    seen: list[Tensor] = []
    note.seen = []  # type: ignore[attr-defined]
    for model in models:
        model[0].register_forward_hook(keep)  # type: ignore[index]
    keep.seen = seen  # type: ignore[attr-defined]
    outputs = Ensemble(models, strategy="fused").run(hidden, X.double())
    expected = torch.stack([model[0](X.double()) for model in models])  # type: ignore[index]
    torch.testing.assert_close(outputs, expected)


def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    keep.seen.append(output)  # type: ignore[attr-defined]


def hidden(member: nn.Module, x: Tensor) -> Tensor:
    keep.seen.clear()  # type: ignore[attr-defined]
    member(x)
    return keep.seen[0]  # type: ignore[attr-defined, no-any-return]


def test_an_error_names_the_layer() -> None:
    ens = Ensemble([nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(5, 2)) for _ in range(3)])
    ens.strategy = "fused"
    with pytest.raises(RuntimeError, match="Expected size") as info:
        ens(X)
    assert "raised in `2` (Linear)" in info.value.__notes__[0]


def test_hooks_for_every_module_of_the_process_are_run() -> None:
    ens = Ensemble([CHAINS["linear and activations"]() for _ in range(3)], strategy="fused")
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(type(module).__name__)
    )
    try:
        ens(X.double())
    finally:
        handle.remove()
    assert called[:3] == ["Linear", "ReLU", "Linear"]


# Every layer that has a step

IMAGES, SIGNALS, VOLUMES = (2, 4, 6, 6), (2, 4, 9), (2, 4, 5, 5, 5)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 3), (5, 4)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, 2, padding=1, groups=2), SIGNALS),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False), IMAGES),
    "Conv3d": (lambda: nn.Conv3d(4, 2, 2), VOLUMES),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4, eps=0.1), IMAGES),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4, affine=False), VOLUMES),
    "LayerNorm": (lambda: nn.LayerNorm((6, 6), eps=0.1), IMAGES),
    "Embedding": (lambda: nn.Embedding(10, 3, padding_idx=2), (5, 4)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(10, 3, mode="max"), (5, 4)),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True, norm_first=True),
        (5, 6, 4),
    ),
    "MaxPool1d": (lambda: nn.MaxPool1d(3, 2, 1, ceil_mode=True), SIGNALS),
    "MaxPool2d": (lambda: nn.MaxPool2d((2, 3), padding=1, dilation=2), IMAGES),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), VOLUMES),
    "AvgPool1d": (lambda: nn.AvgPool1d(3, 2, 1, count_include_pad=False), SIGNALS),
    "AvgPool2d": (lambda: nn.AvgPool2d(2, divisor_override=3), IMAGES),
    "AvgPool3d": (lambda: nn.AvgPool3d((1, 2, 3), ceil_mode=True), VOLUMES),
    "AdaptiveAvgPool1d": (lambda: nn.AdaptiveAvgPool1d(2), SIGNALS),
    "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d((2, 3)), IMAGES),
    "AdaptiveAvgPool3d": (lambda: nn.AdaptiveAvgPool3d(1), VOLUMES),
    "Flatten": (nn.Flatten, IMAGES),
    "Identity": (nn.Identity, IMAGES),
    "Dropout": (nn.Dropout, IMAGES),
    "Dropout1d": (nn.Dropout1d, SIGNALS),
    "Dropout2d": (nn.Dropout2d, IMAGES),
    "Dropout3d": (nn.Dropout3d, VOLUMES),
    "ReLU": (nn.ReLU, IMAGES),
    "Tanh": (nn.Tanh, IMAGES),
    "Sigmoid": (nn.Sigmoid, IMAGES),
    "GELU": (lambda: nn.GELU("tanh"), IMAGES),
    "SiLU": (nn.SiLU, IMAGES),
    "Hardswish": (nn.Hardswish, IMAGES),
    "Hardsigmoid": (nn.Hardsigmoid, IMAGES),
    "LeakyReLU": (lambda: nn.LeakyReLU(0.3), IMAGES),
    "ELU": (lambda: nn.ELU(0.7), IMAGES),
}


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def alike(name: str, *, alone: bool) -> list[nn.Module]:
    """Three modules with the layer: alone, or between others that have no step of their own."""
    make, _ = LAYERS[name]
    models = []
    for _ in range(3):
        layer = make()
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
        model = layer if alone else nn.Sequential(nn.Identity(), layer, nn.SiLU(), Doubled())
        models.append(model.double().eval())
    return models


def inputs_of(name: str) -> Tensor:
    shape = (3, *LAYERS[name][1])
    if "Embedding" in name:
        return torch.randint(10, shape)
    return torch.randn(shape, dtype=torch.float64)


def test_every_step_has_a_row() -> None:
    assert LAYERS.keys() == {kind.__name__ for kind in STEPS}


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a chain"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per member"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_the_loop(name: str, shared: bool, alone: bool) -> None:
    models, xs = alike(name, alone=alone), inputs_of(name)
    given = [xs[0]] * 3 if shared else list(xs)
    for strategy in ("fused", "loop"):
        ens = Ensemble(models, strategy=strategy)  # type: ignore[arg-type]
        for grad in (False, True):
            before = xs.clone()
            with torch.set_grad_enabled(grad):
                outputs = ens(xs[0] if shared else per_member(xs))
                expected = torch.stack([m(x) for m, x in zip(models, given, strict=True)])
            torch.testing.assert_close(outputs, expected)
            assert torch.equal(xs, before), "the input was written to"


@pytest.mark.parametrize("name", [name for name in LAYERS if "Embedding" not in name])
def test_a_layer_has_the_gradients_of_the_loop(name: str) -> None:
    models, xs = alike(name, alone=False), inputs_of(name).requires_grad_()
    ens = Ensemble(models, strategy="fused")
    outputs = ens(per_member(xs))
    expected = torch.stack([model(x) for model, x in zip(models, xs, strict=True)])
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((outputs * weights).sum(), [xs, *ens.parameters()])
    (of_inputs,) = torch.autograd.grad((expected * weights).sum(), xs, retain_graph=True)
    torch.testing.assert_close(found[0], of_inputs)
    (expected * weights).sum().backward(inputs=[p for m in models for p in m.parameters()] or [xs])
    for (path, _), gradient in zip(ens.members.named_parameters(), found[1:], strict=True):
        own = torch.stack([model.get_parameter(path).grad for model in models])  # type: ignore[misc]
        torch.testing.assert_close(gradient, own)


@pytest.mark.parametrize("name", [name for name, (make, _) in LAYERS.items()])
def test_a_layer_in_a_chain_takes_the_short_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[int] = []
    run = leaf.run_chain

    def spy(*args: object) -> object:
        found = run(*args)  # type: ignore[arg-type]
        reached.append(0 if found is None else found[1])
        return found

    monkeypatch.setattr(leaf, "run_chain", spy)
    ens = Ensemble(alike(name, alone=False), strategy="fused")
    with torch.no_grad():
        ens(per_member(inputs_of(name)))
    assert reached == [3]  # Identity, the layer, SiLU


@pytest.mark.parametrize("strategy", ["fused", "loop"])
def test_without_gradients_activations_behind_convolutions_are_in_place(strategy: str) -> None:
    layers = (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Hardswish())
    models = [chain(*layers)().eval() for _ in range(3)]
    ens = Ensemble(models, strategy=strategy)  # type: ignore[arg-type]
    x = torch.randn(IMAGES, dtype=torch.float64)
    with torch.no_grad():
        ens(x)
        with torch.profiler.profile() as profile:
            ens(x)
    names = [event.name for event in profile.events()]
    assert {"aten::relu_", "aten::hardswish_"} <= set(names)
    assert not {"aten::relu", "aten::hardswish"} & set(names)


def test_a_layer_in_train_mode_runs_itself_and_the_chain_goes_on() -> None:
    layers = (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    models = [chain(*layers)() for _ in range(3)]
    ens = Ensemble(models, strategy="fused")
    xs = torch.randn(3, *IMAGES, dtype=torch.float64)
    with torch.no_grad():
        outputs = ens(per_member(xs))
        expected = torch.stack([model(x) for model, x in zip(models, xs, strict=True)])
    torch.testing.assert_close(outputs, expected)
    oracles.assert_state_equal(ens, models)


def test_options_that_a_step_does_not_know_are_the_layers_own() -> None:
    bags = [nn.EmbeddingBag(10, 3).double() for _ in range(3)]
    words, starts = torch.randint(10, (9,)), torch.tensor([0, 4])
    outputs = Ensemble(bags, strategy="fused")(words, starts)
    torch.testing.assert_close(outputs, torch.stack([bag(words, starts) for bag in bags]))
    layers = [nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval() for _ in "abc"]
    x, mask = torch.randn(2, 5, 4, dtype=torch.float64), torch.ones(5, 5).triu(1).bool()
    with torch.no_grad():
        outputs = Ensemble(layers, strategy="fused")(x, src_mask=mask)
        torch.testing.assert_close(outputs, torch.stack([layer(x, mask) for layer in layers]))


def test_an_encoder_layer_beyond_the_cache_is_torchs_own_op(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("unisono.engine.rules.native_attention")
    monkeypatch.setattr(module, "_CACHED", 1)
    monkeypatch.setattr(module, "_SMALL", 1)
    layers = [nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double().eval() for _ in "abc"]
    xs = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False, False, True, True, True]])
    for masks in ({}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            outputs = Ensemble(layers, strategy="fused")(per_member(xs), **masks)
            own = [layer(x, **masks) for layer, x in zip(layers, xs, strict=True)]
        assert torch.equal(outputs, torch.stack(own))


def ops_of(ens: Ensemble, *args: object) -> list[str]:
    """The ops of a call without gradients; a mode would keep layers from taking the short way."""
    with torch.no_grad():
        ens(*args)
        with torch.profiler.profile() as profile:
            ens(*args)
    return [event.name for event in sorted(profile.events(), key=lambda e: e.time_range.start)]


JOINED = {
    "affine": (nn.Conv2d(4, 4, 3, bias=True), nn.BatchNorm2d(4)),
    "no bias": (nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)),
    "not affine": (nn.Conv2d(4, 2, 3, padding="same"), nn.BatchNorm2d(2, affine=False)),
    "three axes": (nn.Conv3d(4, 2, 2), nn.BatchNorm3d(2)),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per member"])
@pytest.mark.parametrize("name", JOINED)
def test_a_batch_norm_behind_a_convolution_is_part_of_it(
    name: str, shared: bool, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unisono.engine.steps.pairs._MANY", 0)
    models = [chain(*JOINED[name])().eval() for _ in range(3)]
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.5, 1.5)
        if channels_last and name != "three axes":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ens = Ensemble(models, strategy="fused")
    shape = (8, 4, 5, 5, 5) if name == "three axes" else (8, 4, 20, 20)
    xs = torch.randn(3, *shape, dtype=torch.float64)
    given = [xs[0]] * 3 if shared else list(xs)
    with torch.no_grad():
        expected = torch.stack([model(x) for model, x in zip(models, given, strict=True)])
        torch.testing.assert_close(ens(xs[0] if shared else per_member(xs)), expected)
    found = ops_of(ens, xs[0] if shared else per_member(xs))
    assert not [op for op in found if "batch_norm" in op]


@pytest.mark.parametrize(
    "why",
    ["train mode", "gradients", "few results", "more filters than results", "half", "autocast"],
)
def test_and_where_it_cannot_be_or_does_not_pay_it_is_a_layer(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unisono.engine.steps.pairs._MANY", 1 << 30 if why == "few results" else 0)
    models = [nn.Sequential(nn.Conv2d(4, 64, 3), nn.BatchNorm2d(64)).eval() for _ in range(3)]
    x = torch.randn(1, 4, 5, 5) if why == "more filters than results" else torch.randn(4, 4, 30, 30)
    for model in models:
        model.train(why == "train mode")
        model.to(torch.bfloat16 if why == "half" else torch.float32)
    ens = Ensemble(models, strategy="fused")
    x = x.to(torch.bfloat16) if why == "half" else x
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast")
    with torch.set_grad_enabled(why == "gradients"), torch.profiler.profile() as profile, autocast:
        ens(x)
    assert [event for event in profile.events() if "batch_norm" in event.name]


def test_relu_before_a_max_pool_runs_behind_it() -> None:
    layers = (nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.ReLU(inplace=True))
    models = [chain(*layers, nn.MaxPool2d(2))() for _ in range(3)]
    ens = Ensemble(models, strategy="fused")
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64)
    x[0, 0, 3, 3] = torch.nan
    expected = torch.stack([model(x) for model in models])
    with torch.no_grad():
        torch.testing.assert_close(ens(x), expected, equal_nan=True)
    torch.testing.assert_close(ens(x), expected, equal_nan=True)
    order = [op for op in ops_of(ens, x) if op in ("aten::relu_", "aten::max_pool2d")]
    assert order == ["aten::max_pool2d", "aten::relu_"] * 2


@pytest.mark.parametrize("strategy", ["fused", "loop"])
def test_relu_before_a_max_pool_runs_behind_it_in_training(strategy: str) -> None:
    layers = (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    models = [chain(*layers)() for _ in range(3)]
    ens = Ensemble(copy.deepcopy(models), strategy=strategy)  # type: ignore[arg-type]
    # Of equal values, of zeros and of windows without a positive one, too.
    x = torch.randn(2, 4, 12, 12, dtype=torch.float64).round().clamp(-2, 1)
    x[0, :, :6, :6] = -1.0
    with torch.profiler.profile() as profile:
        outputs = ens(x)
    outputs.square().sum().backward()
    expected = torch.stack([model(x) for model in models])
    expected.square().sum().backward()
    torch.testing.assert_close(outputs, expected)
    own = [dict(model.named_parameters()) for model in models]
    for name, parameter in ens.members.named_parameters():
        theirs = torch.stack([each[name].grad for each in own])
        torch.testing.assert_close(parameter.grad, theirs)
    names = [e.name for e in profile.events() if e.name in ("aten::relu", "aten::max_pool2d")]
    assert names == ["aten::max_pool2d", "aten::relu"] * (1 if strategy == "fused" else 3)


def test_relu_before_a_max_pool_gives_the_same_gradient_of_its_input_to_the_bit() -> None:
    layers = (nn.Identity(), nn.ReLU(), nn.MaxPool2d(2))
    for strategy in ("fused", "loop"):
        ens = Ensemble([nn.Sequential(*layers) for _ in range(3)], strategy=strategy)
        xs = torch.randn(3, *IMAGES).mul(2).round().requires_grad_()
        xs.data[:, :, :, 0] = torch.tensor([0.0, -0.0, 1.0]).view(3, 1, 1, 1)
        (found,) = torch.autograd.grad(ens(per_member(xs)).square().sum(), xs)
        plain = torch.stack([F.max_pool2d(x.relu(), 2) for x in xs])
        (expected,) = torch.autograd.grad(plain.square().sum(), xs)
        assert torch.equal(found, expected)


def test_what_a_user_asked_to_be_overwritten_is() -> None:
    models = [nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.MaxPool2d(2)) for _ in "abc"]
    xs = torch.randn(3, *IMAGES)
    with torch.no_grad():
        outputs = Ensemble(models, strategy="fused")(per_member(xs))
    assert (xs >= 0).all()
    expected = [model[2](x) for model, x in zip(models, xs, strict=True)]
    torch.testing.assert_close(outputs, torch.stack(expected))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")  # torch's own use
def test_forward_mode_differentiation_without_gradients() -> None:
    models = [chain(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), Doubled())() for _ in range(3)]
    ens = Ensemble(models, strategy="fused")
    with fwad.dual_level(), torch.no_grad():
        x = fwad.make_dual(X.double(), torch.randn_like(X.double()))
        found = fwad.unpack_dual(ens(x))  # no warning of an op that had to run by member
        own = [fwad.unpack_dual(model(x)) for model in models]
    torch.testing.assert_close(found.tangent, torch.stack([each.tangent for each in own]))


# Encoders


def encoder(norm: bool = True) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    last = nn.LayerNorm(8) if norm else None
    return nn.TransformerEncoder(layer, 2, last, enable_nested_tensor=False).double()


MASK = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
PADDING = torch.zeros(3, 5, dtype=torch.bool)
PADDING[:, 4:] = True


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": None},
        {"mask": MASK},
        {"mask": MASK, "is_causal": True},
        {"src_key_padding_mask": PADDING},
    ],
    ids=str,
)
def test_an_encoder_equals_the_loop(
    options: dict[str, Any], norm: bool, grad: bool, training: bool
) -> None:
    models = [encoder(norm).train(training) for _ in range(3)]
    ens = Ensemble(models, strategy="fused").train(training)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        found = ens(x, **options)
        expected = torch.stack([model(x, **options) for model in models])
        torch.testing.assert_close(found, expected)
    if grad:
        found.sin().sum().backward()
        expected.sin().sum().backward()
        oracles.assert_gradients_equal(ens, models)


def test_an_encoder_says_what_is_wrong_as_its_members_do() -> None:
    models = [encoder() for _ in range(3)]
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        models[0].train()(torch.randn(3, 5, 8, dtype=torch.float64), is_causal=True)
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
        Ensemble(models, strategy="fused")(
            torch.randn(3, 5, 8, dtype=torch.float64), is_causal=True
        )


class Strict(nn.TransformerEncoderLayer):
    """Takes what an encoder passes on, and has no defaults for it."""

    def forward(self, src, src_mask, is_causal, src_key_padding_mask):  # type: ignore[no-untyped-def, override]
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)


def test_an_encoder_passes_on_what_its_layers_take() -> None:
    layer = Strict(8, 2, 16, dropout=0.0, batch_first=True)
    models = [nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval() for _ in range(3)]
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        found = Ensemble(models, strategy="fused")(x)
        torch.testing.assert_close(found, torch.stack([model(x) for model in models]))


def told(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
    told.options = sorted(options)  # type: ignore[attr-defined]


def test_a_hook_sees_what_the_encoder_passes_on() -> None:
    models = [encoder().eval() for _ in range(3)]
    for model in models:
        model.layers[0].register_forward_pre_hook(told, with_kwargs=True)
    with torch.no_grad():
        Ensemble(models, strategy="fused")(torch.randn(3, 5, 8, dtype=torch.float64))
    assert told.options == ["is_causal", "src_key_padding_mask", "src_mask"]  # type: ignore[attr-defined]
