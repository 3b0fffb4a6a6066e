"""Any model: what plain modules may do, equal to the loop, and how each of it runs.

The table says for each model whether all of it runs at once ("fused"), some ops for one member
after another ("op by op"), or all of it ("loop").
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn

from oracles import assert_gradients_equal, assert_outputs_equal, assert_state_equal, total
from unisono import Ensemble, EnsembleError, EnsembleWarning, UnsupportedModelError
from unisono.engine.tree import tree_map

N = 3
X = torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4).sin()
IMAGE = torch.linspace(-3, 3, 2 * 3 * 8 * 8, dtype=torch.float64).view(2, 3, 8, 8).sin()
IDS = torch.tensor([[1, 5, 2, 2], [4, 0, 3, 1]])


class Ran(NamedTuple):
    outputs: Any
    how: str
    text: str  # of the one warning, if there is one


def run(ens: Ensemble, *args: Any, **kwargs: Any) -> Ran:
    """One call, and what it says of the way in which it ran."""
    given = copy.deepcopy((args, kwargs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", EnsembleWarning)
        try:  # without a choice by time, which may find the loop faster
            ens.strategy = "fused"
            outputs = ens(*args, **kwargs)
        except RuntimeError:
            ens.strategy = "auto"
            outputs = ens(*given[0], **given[1])
    texts = [str(warning.message) for warning in caught]
    assert len(texts) <= 1
    assert all(warning.filename == __file__ for warning in caught)
    if ens.strategy == "auto":
        return Ran(outputs, "loop", "".join(texts))
    return Ran(outputs, "op by op" if texts else "fused", "".join(texts))


# Ops without a batching rule ----------------------------------------------------------------------


class WithLinear(nn.Module):
    """A layer in front of what a subclass does with its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        return self.then(self.linear(x))


class MaskWrite(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        z = y.clone()
        z[y > 0] = y.mean()
        return z


class MaskRead(WithLinear):
    """As many rows for every member."""

    def then(self, y: Tensor) -> Tensor:
        rows = y.argmax(0)[:1] != torch.arange(5)
        return y[rows] * 2


class MaskRagged(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        return y[y > 0].mean()


class Nonzero(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        return y.flatten()[(y != y.max()).flatten().nonzero()].sum(0)


class Item(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        return y * (y.shape[0] + (y * 0).sum().item())


class ItemPerMember(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        return y * y.abs().max().item()


class Finite(WithLinear):
    """A check that all members pass."""

    def then(self, y: Tensor) -> Tensor:
        if not torch.isfinite(y).all():
            raise ValueError("not finite")
        return y * 2


class EarlyExit(nn.Module):
    """Stops at the first layer whose output is confident enough."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
            if x.abs().mean() < 0.3:
                break
        return x


class SliceByValue(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        n = (y * 0).sum().long() + 3
        z = y.clone()
        z[:n].mul_(2)  # a view, written to
        return z


class Unique(WithLinear):
    def then(self, y: Tensor) -> tuple[Tensor, Tensor]:
        values, counts = (y.detach() * 1000).unique(return_counts=True)
        return values, counts


class Square(torch.autograd.Function):
    """In the style from before torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class OldFunction(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        return Square.apply(y) + y


class PackedTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([5, 3])
        packed = rnn.pack_padded_sequence(torch.stack([x, x + 1]), lengths, batch_first=True)
        y, h = self.rnn(packed)
        return rnn.pad_packed_sequence(y, batch_first=True)[0], h


# Tensors made in forward and written to -----------------------------------------------------------


class FreshBuffer(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        z = torch.zeros(5, 4, dtype=y.dtype)
        z[1] = y[0]
        z[2].copy_(y[1])
        z.add_(y)
        out = torch.ones_like(z)
        out.scatter_(0, torch.zeros(1, 4, dtype=torch.long), y[:1])
        return out.index_add_(0, torch.tensor([0, 0, 1, 2, 4]), z)


class FreshFromInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = x * 2
        z[0] = self.linear(x)[1]
        return z


class RunningLoss(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        loss = torch.tensor(0.0, dtype=y.dtype)
        for row in y:
            loss += row.square().mean()
        return loss


class TensorAttribute(WithLinear):
    """Keeps its last output, and a table, as plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(5, 4, dtype=torch.float64)
        self.table = torch.arange(4, dtype=torch.float64)

    def then(self, y: Tensor) -> Tensor:
        y = y + self.last * self.table
        self.last = y.detach()
        return y


# State in training --------------------------------------------------------------------------------


class CumulativeNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4, momentum=None)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


class VectorQuantizer(nn.Module):
    """Nearest code, straight-through gradient, codebook as a moving average in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("codes", torch.randn(6, 4, dtype=torch.float64))
        self.register_buffer("counts", torch.ones(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        ids = torch.cdist(y, self.codes).argmin(1)
        if self.training:
            with torch.no_grad():
                hot = F.one_hot(ids, 6).to(y.dtype)
                self.counts.mul_(0.9).add_(hot.sum(0), alpha=0.1)
                self.codes.mul_(0.9).add_(hot.T @ y / self.counts[:, None], alpha=0.1)
        codes = self.codes[ids]
        return y + (codes - y).detach(), (codes.detach() - y).square().mean()


def normed(norm: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(norm(nn.Linear(4, 4)), nn.Tanh(), norm(nn.Linear(4, 2)))


def old_spectral_norm(module: nn.Module) -> nn.Module:
    return nn.utils.spectral_norm(module)


# Derivatives inside forward -----------------------------------------------------------------------


class Forces(nn.Module):
    """A potential energy and minus its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x.requires_grad_(True)
        energy = self.energy(x).sum()
        (grad,) = torch.autograd.grad(energy, x, create_graph=True)
        return {"energy": energy, "forces": -grad}


class FunctionalForces(Forces):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        energy = self.energy(x).sum()
        return {"energy": energy, "forces": -torch.func.grad(lambda x: self.energy(x).sum())(x)}


class PartlyWithoutGradient(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            scale = y.abs().amax(0)
        return y / scale.detach() + y.data.mean()


# Architectures ------------------------------------------------------------------------------------


class CacheLayer:
    """Keys and values of one layer."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        first = self.keys is None
        self.keys = keys if first else torch.cat([self.keys, keys], 1)
        self.values = values if first else torch.cat([self.values, values], 1)
        return self.keys, self.values


class Cache:
    """A plain object with a list of plain objects, as language models return it."""

    def __init__(self, layers: int) -> None:
        self.layers = [CacheLayer() for _ in range(layers)]
        self.name = "dynamic"


@dataclass
class ModelOutput(OrderedDict):
    """Both a dict and a dataclass, as Hugging Face has it."""

    logits: Tensor | None = None
    cache: Cache | None = None

    def __post_init__(self) -> None:
        for key in ("logits", "cache"):
            if getattr(self, key) is not None:
                super().__setitem__(key, getattr(self, key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.logits, self.cache)


class Decoder(nn.Module):
    """Two causal layers with a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 12) for _ in range(2))

    def forward(self, ids: Tensor) -> ModelOutput:
        cache, h = Cache(2), self.embedding(ids)
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            q, k, v = layer(h).chunk(3, -1)
            h = h + F.scaled_dot_product_attention(q, *kept.update(k, v), is_causal=True)
        return ModelOutput(logits=h @ self.embedding.weight.T, cache=cache)


class Detector(nn.Module):
    """Boxes above a threshold of the score: as many as the member finds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        y = self.conv(image).permute(0, 2, 3, 1)
        scores, boxes = y[..., 0].sigmoid(), y[..., 1:]
        keep = (scores > scores.flatten().topk(7)[0][-1]).nonzero(as_tuple=True)
        return {"scores": scores[keep], "boxes": boxes[keep]}


class Mixture(nn.Module):
    """Experts on the rows that are routed to them."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = chosen == k
            out[rows] = expert(x[rows])
        return out


class Rearranged(nn.Module):
    """Patches cut by hand, and a loop over them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 4)

    def forward(self, image: Tensor) -> Tensor:
        b, c, h, w = image.shape
        patches = image.reshape(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(b, -1, c * 16)
        return torch.stack([self.linear(patches[:, k]) for k in range(patches.shape[1])], 1)


def swish(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * x


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted_swish = torch.jit.script(swish)


class Scripted(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        return scripted_swish(y) + scripted_swish(y * 2)


class Conditional(WithLinear):
    def then(self, y: Tensor) -> Tensor:
        y = y.detach()  # for torch, tracing the branches, warns of gradients on its way
        return torch.cond(y.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (y,))


@dataclass(frozen=True)
class Model:
    make: Callable[[], nn.Module]
    how: str
    inputs: Sequence[Any] = field(default_factory=lambda: (X,))
    gradients: bool = True


MODELS = {
    "mask-write": Model(MaskWrite, "op by op"),
    "mask-read": Model(MaskRead, "op by op"),
    "mask-ragged": Model(MaskRagged, "loop"),
    "nonzero": Model(Nonzero, "op by op"),
    "item": Model(Item, "op by op"),
    "item-per-member": Model(ItemPerMember, "loop"),
    "check-of-values": Model(Finite, "op by op"),
    "early-exit": Model(EarlyExit, "loop"),
    "slice-by-value": Model(SliceByValue, "op by op"),
    "unique": Model(Unique, "op by op", gradients=False),
    "function-without-setup-context": Model(OldFunction, "op by op"),
    "packed-sequence": Model(PackedTagger, "fused"),
    "fresh-buffer": Model(FreshBuffer, "op by op"),
    "fresh-from-input": Model(FreshFromInput, "op by op"),
    "running-loss": Model(RunningLoss, "op by op"),
    "tensor-attribute": Model(TensorAttribute, "fused"),
    "batch-norm-momentum-none": Model(CumulativeNorm, "op by op"),
    "vector-quantizer": Model(VectorQuantizer, "fused"),
    "weight-norm": Model(normed(parametrizations.weight_norm), "fused"),
    "spectral-norm": Model(normed(parametrizations.spectral_norm), "op by op"),
    "orthogonal": Model(normed(parametrizations.orthogonal), "fused"),
    "forces": Model(Forces, "op by op"),
    "functional-forces": Model(FunctionalForces, "fused"),
    "partly-without-gradient": Model(PartlyWithoutGradient, "op by op"),
    "decoder-with-cache": Model(Decoder, "fused", (IDS,)),
    "detector": Model(Detector, "op by op", (IMAGE,)),
    "mixture-of-experts": Model(Mixture, "loop"),
    "rearranged": Model(Rearranged, "fused", (IMAGE,)),
    "scripted": Model(Scripted, "fused"),
    "cond": Model(Conditional, "fused", gradients=False),
}


def member_of(outputs: Any, i: int) -> Any:
    return tree_map(lambda leaf: leaf[i] if isinstance(leaf, Tensor) else leaf, outputs)


def build(make: Callable[[], nn.Module]) -> Ensemble:
    torch.manual_seed(0)
    return Ensemble([make().double() for _ in range(N)])


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_the_loop(name: str) -> None:
    model = MODELS[name]
    ens = build(model.make)
    members = ens.unstack()
    for k in range(2):  # the second call starts from the state that the first one left
        ran = run(ens, *copy.deepcopy(model.inputs))
        expected = [member(*copy.deepcopy(model.inputs)) for member in members]
        assert_outputs_equal(ran.outputs, expected)
        assert_state_equal(ens, members)
        assert bool(ran.text) == (k == 0 and model.how != "fused")
        if k == 0:
            assert ran.how == model.how
    if model.gradients:
        sum(total(member_of(ran.outputs, i)) for i in range(N)).backward()
        sum(total(output) for output in expected).backward()
        assert_gradients_equal(ens, members)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].how == "loop"])
def test_fused_forbids_the_loop(name: str) -> None:
    ens = build(MODELS[name].make)
    ens.strategy = "fused"
    before = {key: tensor.clone() for key, tensor in ens.state_dict().items()}
    with pytest.raises(RuntimeError, match="vmap: "):
        ens(*copy.deepcopy(MODELS[name].inputs))
    assert all(torch.equal(ens.state_dict()[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("name", ["decoder-with-cache", "detector", "spectral-norm", "forces"])
def test_a_part_of_the_members_at_a_time(name: str) -> None:
    ens = build(MODELS[name].make)
    ens.chunk_size = 2
    members = ens.unstack()
    ran = run(ens, *copy.deepcopy(MODELS[name].inputs))
    assert ran.how == MODELS[name].how
    expected = [member(*copy.deepcopy(MODELS[name].inputs)) for member in members]
    assert_outputs_equal(ran.outputs, expected)
    assert_state_equal(ens, members)


def test_a_model_output_with_a_cache() -> None:
    output = run(build(Decoder), IDS).outputs
    assert type(output) is ModelOutput
    assert output.logits is output["logits"]
    assert type(output.cache) is Cache
    assert output.cache.layers[1].keys.shape == (N, 2, 4, 4)
    assert output.cache.name == "dynamic"


class Named(nn.Module):
    """A model with the op in question deep inside."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Identity(), part])

    def forward(self, x: Tensor) -> Any:
        for part in self.parts:
            x = part(x)
        return x


def line_of(kind: type[nn.Module], step: int) -> str:
    return f"test_any_model.py:{vars(kind)['then'].__code__.co_firstlineno + step}"


def test_the_warning_for_one_op() -> None:
    assert run(build(lambda: Named(MaskWrite())), X).text == (
        "Ensemble of 3 Named: forward can't run for all members at once as it stands; from now on"
        " it runs at once except for this:\n"
        f"  `parts.1` (MaskWrite), {line_of(MaskWrite, 2)}: writing with a boolean mask, for one"
        " member after another\n"
        "    reason: vmap: We do not support batching operators that can support dynamic shape\n"
        "    remedy: use torch.where(mask, a, b) instead of x[mask]\n"
        '  strategy="loop" runs all of it member by member and says nothing'
    )


def test_the_warning_for_a_function_without_setup_context() -> None:
    assert run(build(lambda: Named(OldFunction())), X).text == (
        "Ensemble of 3 Named: forward can't run for all members at once as it stands; from now on"
        " it runs at once except for this:\n"
        f"  `parts.1` (OldFunction), {line_of(OldFunction, 1)}: Square.apply, for one member after"
        " another\n"
        "    reason: In order to use an autograd.Function with functorch transforms (vmap, grad,"
        " jvp, jacrev, ...), it must override the setup_context staticmethod\n"
        "    remedy: write setup_context and vmap for it, see"
        " https://docs.pytorch.org/docs/main/notes/extending.func.html\n"
        '  strategy="loop" runs all of it member by member and says nothing'
    )


def test_the_warning_for_tensors_written_in_place() -> None:
    assert run(build(lambda: Named(FreshBuffer())), X).text == (
        "Ensemble of 3 Named: forward can't run for all members at once as it stands; from now on"
        " it runs at once except for this:\n"
        "  `parts.1` (FreshBuffer): every member gets its own copy of the inputs and of the tensors"
        " made there\n"
        "    reason: RuntimeError: vmap: inplace arithmetic(self, *extra_args) is not possible"
        " because there exists a Tensor `other` in extra_args that has more elements than `self`\n"
        "    remedy: create the tensor from an input: x.new_zeros(...) instead of"
        " torch.zeros(...)\n"
        '  strategy="loop" runs all of it member by member and says nothing'
    )


def test_the_warning_for_the_loop() -> None:
    text = run(build(lambda: Named(ItemPerMember())), X).text
    assert text.replace(text.partition("values: ")[2].partition("\n")[0], "VALUES") == (
        f"Ensemble of 3 Named: `parts.1` (ItemPerMember), {line_of(ItemPerMember, 1)} can't run for"
        " all members at once, so this call runs member by member from now on (strategy"
        ' "loop").\n'
        "  reason: Tensor.item: the members gave different values: VALUES\n"
        "  remedy: keep it a tensor: torch.where(condition, a, b) instead of `if`, and no .item()"
        ' or .tolist(); strategy="loop" says that the loop is fine, strategy="fused" makes this an'
        " error"
    )


# What neither way can give a member axis


class ReturnsAFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return lambda z: z + y


def test_functions_of_the_members_are_not_taken_for_one() -> None:
    models = [ReturnsAFunction() for _ in range(3)]
    with pytest.raises(EnsembleError, match="isn't a tensor and differs between the members"):
        Ensemble(models, strategy="loop")(torch.randn(5, 3))
    with pytest.raises(EnsembleError, match="forward returns tensors inside a function"):
        Ensemble(models)(torch.randn(5, 3))


class FillsACache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        cache.append(self.linear(x))
        return cache[-1]


def test_a_cache_that_all_members_would_fill_is_refused_without_a_loop() -> None:
    ens = Ensemble([FillsACache() for _ in range(3)])
    with pytest.raises(UnsupportedModelError, match="puts a tensor of the members into"):
        ens(torch.randn(5, 3), [])
