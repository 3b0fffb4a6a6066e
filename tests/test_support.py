"""Every class of torch.nn stands in one list, runs, and runs the way its list says.

``python tests/test_support.py`` (with ``src`` on the path) writes docs/support.md anew.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracles
from unisono import Ensemble, EnsembleWarning, UnsupportedModelError, per_member
from unisono.engine.kernels import noted
from unisono.engine.rules import BY_MEMBER, RULES
from unisono.engine.tree import leaves

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
N = 2


@dataclass(frozen=True)
class Entry:
    """How a class is built, and inputs for one member."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    random: bool = False  # draws random numbers in training


def entry(
    kind: Callable[..., nn.Module], *args: Any, x: Any, random: bool = False, **kwargs: Any
) -> Entry:
    """``x`` is the shapes of the inputs, or a function that makes them."""

    def inputs() -> tuple[Tensor, ...]:
        if callable(x):
            made = x()
            return made if isinstance(made, tuple) else (made,)
        shapes = x if isinstance(x[0], tuple) else (x,)
        return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)

    return Entry(lambda: kind(*args, **kwargs), inputs, random)


def _r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _labels(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


def _signs(*shape: int) -> Tensor:
    return _r(*shape).sign()


def _by_dims(name: str, *args: Any, channels: int = 2, **kwargs: Any) -> dict[str, Entry]:
    """The classes for one, two and three dimensions."""
    return {
        f"{name}{d}d": entry(getattr(nn, f"{name}{d}d"), *args, x=(3, channels, *[6] * d), **kwargs)
        for d in (1, 2, 3)
    }


def _elementwise(*names: str, **kwargs: Any) -> dict[str, Entry]:
    return {name: entry(getattr(nn, name), x=(3, 4), **kwargs) for name in names}


class _Unpool(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.pool = getattr(nn, f"MaxPool{d}d")(2, return_indices=True)
        self.unpool = getattr(nn, f"MaxUnpool{d}d")(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


def _fractional_pool(d: int) -> nn.Module:
    samples = torch.rand(3, 2, d, dtype=torch.float64)
    return getattr(nn, f"FractionalMaxPool{d}d")(2, 3, _random_samples=samples)


def _attention(kind: type[nn.Module], *args: Any, **kwargs: Any) -> Entry:
    shapes = ((3, 4, 8), (3, 5, 8), (3, 5, 8))[: 3 if kind is nn.MultiheadAttention else 2]
    is_encoder = kind in (nn.TransformerEncoderLayer, nn.TransformerEncoder)
    return entry(kind, *args, x=shapes[:1] if is_encoder else shapes, **kwargs)


_LAYER = {"dim_feedforward": 16, "dropout": 0.0, "batch_first": True}

RULE: dict[str, Entry] = {
    "Linear": entry(nn.Linear, 5, 3, x=(3, 5)),
    **_by_dims("Conv", 2, 3, 3),
    **_by_dims("ConvTranspose", 2, 3, 3),
    **_by_dims("BatchNorm", 2),
    **_by_dims("InstanceNorm", 2, affine=True),
    "SyncBatchNorm": entry(nn.SyncBatchNorm, 2, x=(3, 2, 6), random=True),  # needs CUDA to train
    "LSTM": entry(nn.LSTM, 3, 4, x=(5, 2, 3)),
    "GRU": entry(nn.GRU, 3, 4, x=(5, 2, 3)),
    "RNN": entry(nn.RNN, 3, 4, x=(5, 2, 3)),
    "GroupNorm": entry(nn.GroupNorm, 2, 4, x=(3, 4, 6)),
    "LayerNorm": entry(nn.LayerNorm, 5, x=(3, 5)),
    "RMSNorm": entry(nn.RMSNorm, 5, x=(3, 5)),
    "Embedding": entry(nn.Embedding, 7, 3, x=lambda: _labels(7, 3, 4)),
    "EmbeddingBag": entry(nn.EmbeddingBag, 7, 3, x=lambda: _labels(7, 3, 4)),
    "MultiheadAttention": _attention(nn.MultiheadAttention, 8, 2, batch_first=True),
    "Transformer": _attention(nn.Transformer, 8, 2, 1, 1, **_LAYER),
    "TransformerEncoderLayer": _attention(nn.TransformerEncoderLayer, 8, 2, **_LAYER),
    "TransformerDecoderLayer": _attention(nn.TransformerDecoderLayer, 8, 2, **_LAYER),
    "TransformerEncoder": _attention(
        nn.TransformerEncoder, nn.TransformerEncoderLayer(8, 2, **_LAYER), 1
    ),
    "TransformerDecoder": _attention(
        nn.TransformerDecoder, nn.TransformerDecoderLayer(8, 2, **_LAYER), 1
    ),
    **_by_dims("AvgPool", 2),
    **_by_dims("MaxPool", 2),
    **_by_dims("AdaptiveAvgPool", 2),
    **_by_dims("AdaptiveMaxPool", 2),
    **_by_dims("ConstantPad", 1, 2.0),
    **_by_dims("ZeroPad", 1),
    **_by_dims("CircularPad", 1),
    **_by_dims("ReflectionPad", 1),
    **_by_dims("ReplicationPad", 1),
    "LPPool1d": entry(nn.LPPool1d, 2, 2, x=(3, 2, 6)),
    "LPPool2d": entry(nn.LPPool2d, 2, 2, x=(3, 2, 6, 6)),
    "LPPool3d": entry(nn.LPPool3d, 2, 2, x=(3, 2, 6, 6, 6)),
    "LocalResponseNorm": entry(nn.LocalResponseNorm, 2, x=(3, 4, 6)),
    "Upsample": entry(nn.Upsample, scale_factor=2, mode="bicubic", x=(3, 2, 4, 4)),
    "UpsamplingBilinear2d": entry(nn.UpsamplingBilinear2d, scale_factor=2, x=(3, 2, 4, 4)),
    "UpsamplingNearest2d": entry(nn.UpsamplingNearest2d, scale_factor=2, x=(3, 2, 4, 4)),
    "CrossEntropyLoss": entry(nn.CrossEntropyLoss, x=lambda: (_r(3, 5), _labels(5, 3))),
    "LinearCrossEntropyLoss": entry(
        nn.LinearCrossEntropyLoss, 4, 5, x=lambda: (_r(3, 4), _labels(5, 3))
    ),
    "NLLLoss": entry(nn.NLLLoss, x=lambda: (_r(3, 5), _labels(5, 3))),
    "NLLLoss2d": entry(nn.NLLLoss, x=lambda: (_r(3, 5, 2, 2), _labels(5, 3, 2, 2))),
    "BCELoss": entry(nn.BCELoss, x=lambda: (_r(3, 4).sigmoid(), _r(3, 4).sigmoid())),
    "BCEWithLogitsLoss": entry(nn.BCEWithLogitsLoss, x=lambda: (_r(3, 4), _r(3, 4).sigmoid())),
    "KLDivLoss": entry(
        nn.KLDivLoss, reduction="batchmean", x=lambda: (_r(3, 4), _r(3, 4).softmax(-1))
    ),
    "MarginRankingLoss": entry(nn.MarginRankingLoss, x=lambda: (_r(3), _r(3), _signs(3))),
    "SoftMarginLoss": entry(nn.SoftMarginLoss, x=lambda: (_r(3, 4), _signs(3, 4).long())),
    "MultiMarginLoss": entry(nn.MultiMarginLoss, x=lambda: (_r(3, 5), _labels(5, 3))),
    "MultiLabelMarginLoss": entry(nn.MultiLabelMarginLoss, x=lambda: (_r(3, 5), _labels(5, 3, 5))),
    "TripletMarginLoss": entry(nn.TripletMarginLoss, x=((3, 4), (3, 4), (3, 4))),
}

TORCH: dict[str, Entry] = {
    **_elementwise(
        *("CELU", "ELU", "GELU", "GLU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh"),
        *("Identity", "LeakyReLU", "LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6", "SELU"),
        *("SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink"),
        *("Flatten",),
    ),
    **_elementwise("LogSoftmax", "Softmax", "Softmin", dim=-1),
    **_elementwise("AlphaDropout", "Dropout", "FeatureAlphaDropout", random=True),
    **{
        f"Dropout{d}d": entry(getattr(nn, f"Dropout{d}d"), x=(3, 2, *[4] * d), random=True)
        for d in (1, 2, 3)
    },
    "Softmax2d": entry(nn.Softmax2d, x=(3, 2, 4, 4)),
    "Threshold": entry(nn.Threshold, 0.1, 2.0, x=(3, 4)),
    "ChannelShuffle": entry(nn.ChannelShuffle, 2, x=(3, 4, 4, 4)),
    "PixelShuffle": entry(nn.PixelShuffle, 2, x=(3, 4, 4, 4)),
    "PixelUnshuffle": entry(nn.PixelUnshuffle, 2, x=(3, 4, 4, 4)),
    "Unflatten": entry(nn.Unflatten, 1, (2, 2), x=(3, 4)),
    "Fold": entry(nn.Fold, (4, 4), 2, x=(3, 8, 9)),
    "Unfold": entry(nn.Unfold, 2, x=(3, 2, 4, 4)),
    "CosineSimilarity": entry(nn.CosineSimilarity, x=((3, 4), (3, 4))),
    "PairwiseDistance": entry(nn.PairwiseDistance, x=((3, 4), (3, 4))),
    "L1Loss": entry(nn.L1Loss, x=((3, 4), (3, 4))),
    "MSELoss": entry(nn.MSELoss, x=((3, 4), (3, 4))),
    "HuberLoss": entry(nn.HuberLoss, x=((3, 4), (3, 4))),
    "SmoothL1Loss": entry(nn.SmoothL1Loss, x=((3, 4), (3, 4))),
    "PoissonNLLLoss": entry(nn.PoissonNLLLoss, x=((3, 4), (3, 4))),
    "CosineEmbeddingLoss": entry(nn.CosineEmbeddingLoss, x=lambda: (_r(3, 4), _r(3, 4), _signs(3))),
    "HingeEmbeddingLoss": entry(nn.HingeEmbeddingLoss, x=lambda: (_r(3, 4), _signs(3, 4))),
    "MultiLabelSoftMarginLoss": entry(
        nn.MultiLabelSoftMarginLoss, x=lambda: (_r(3, 5), _labels(2, 3, 5))
    ),
    "TripletMarginWithDistanceLoss": entry(
        nn.TripletMarginWithDistanceLoss, x=((3, 4), (3, 4), (3, 4))
    ),
}

ONE_BY_ONE: dict[str, Entry] = {
    **_elementwise("RReLU", random=True),
    "LSTMCell": entry(nn.LSTMCell, 3, 4, x=(2, 3)),
    "GRUCell": entry(nn.GRUCell, 3, 4, x=(2, 3)),
    "RNNCell": entry(nn.RNNCell, 3, 4, x=(2, 3)),
    "Bilinear": entry(nn.Bilinear, 3, 4, 2, x=((3, 3), (3, 4))),
    "CTCLoss": entry(
        nn.CTCLoss,
        x=lambda: (
            _r(6, 2, 5).log_softmax(-1),
            1 + _labels(4, 2, 3),
            torch.tensor([6, 6]),
            torch.tensor([3, 2]),
        ),
    ),
    "FractionalMaxPool2d": entry(_fractional_pool, 2, x=(3, 2, 6, 6)),
    "FractionalMaxPool3d": entry(_fractional_pool, 3, x=(3, 2, 6, 6, 6)),
    **{f"MaxUnpool{d}d": entry(_Unpool, d, x=(3, 2, *[4] * d)) for d in (1, 2, 3)},
}

WHOLE_CALL: dict[str, tuple[str, Entry]] = {
    "AdaptiveLogSoftmaxWithLoss": (
        "which rows go to which cluster depends on the targets",
        entry(
            nn.AdaptiveLogSoftmaxWithLoss,
            *(8, 6, [2, 4]),
            div_value=2.0,
            x=lambda: (_r(5, 8), _labels(6, 5)),
        ),
    ),
    "CrossMapLRN2d": (
        "an `autograd.Function` without a rule for `vmap`",
        entry(nn.CrossMapLRN2d, 2, x=(3, 4, 5, 5)),
    ),
    "GaussianNLLLoss": (
        "raises if a variance is negative, which only the values tell",
        entry(nn.GaussianNLLLoss, x=lambda: (_r(3, 4), _r(3, 4), _r(3, 4).exp())),
    ),
}

_LAZY = tuple(name for name in dir(nn) if name.startswith("Lazy"))
NO_FORWARD: dict[str, str] = {
    **dict.fromkeys(("Module", "Container", "RNNBase", "RNNCellBase"), "a base class"),
    **dict.fromkeys(("ModuleDict", "ModuleList", "ParameterDict", "ParameterList"), "a container"),
    "Sequential": "a container: as its modules",
    **dict.fromkeys(_LAZY, "refused until it has been run once; then the class without `Lazy`"),
    "DataParallel": "refused: put the ensemble into it, not its members",
}

# Options that decide how a class runs.
OPTIONS: dict[str, dict[str, Entry]] = {
    "a rule of unisono": {
        "Conv2d-same": entry(nn.Conv2d, 2, 3, 3, padding="same", dilation=2, x=(3, 2, 6, 6)),
        "Conv2d-depthwise": entry(nn.Conv2d, 4, 8, 3, groups=4, x=(3, 4, 6, 6)),
        "LSTM-bidirectional": entry(nn.LSTM, 3, 4, 2, bidirectional=True, x=(5, 2, 3)),
        "ConvTranspose2d-large": entry(nn.ConvTranspose2d, 8, 32, 3, x=(4, 8, 32, 32)),
    },
    "PyTorch's batching rules": {"L1Loss-sum": entry(nn.L1Loss, reduction="sum", x=((3,), (3,)))},
    "that op member by member": {
        "Embedding-max_norm": entry(nn.Embedding, 7, 3, max_norm=0.5, x=lambda: _labels(7, 4)),
        "EmbeddingBag-padding_idx": entry(
            nn.EmbeddingBag, 7, 3, padding_idx=0, x=lambda: _labels(7, 3, 4)
        ),
        "LSTMCell-unbatched": entry(nn.LSTMCell, 3, 4, x=(3,)),
    },
}

LISTS: dict[str, dict[str, Any]] = {
    "a rule of unisono": RULE,
    "PyTorch's batching rules": TORCH,
    "that op member by member": ONE_BY_ONE,
    "the loop, after a warning": WHOLE_CALL,
    "nothing to run": NO_FORWARD,
}

RUN = [
    pytest.param(entries[name], how, id=name)
    for how in OPTIONS
    for entries in (LISTS[how], OPTIONS[how])
    for name in entries
]


def make(case: Entry, training: bool) -> tuple[list[nn.Module], tuple[Tensor, ...]]:
    """Models with values of their own everywhere, and inputs for each of them."""
    models = [case.make().double().train(training) for _ in range(N)]
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    columns = zip(*[case.inputs() for _ in range(N)], strict=True)
    return models, tuple(torch.stack(column) for column in columns)


@contextmanager
def watched() -> Iterator[set[str]]:
    """The ops that ran by a rule, and "member by member"; torch's own loop is an error."""
    ran: set[str] = set()
    fallback = torch._C._functorch._set_vmap_fallback_enabled
    fallback(False)
    try:
        with noted() as notes:
            yield ran
    finally:
        fallback(True)
    ran |= {note.op if note.how == "rule" else "member by member" for note in notes}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor)]


def member_outputs(models: list[nn.Module], inputs: tuple[Tensor, ...]) -> list[list[Tensor]]:
    return [tensors(model(*(x[i] for x in inputs))) for i, model in enumerate(models)]


def gradients(outputs: list[list[Tensor]], of: list[Tensor]) -> list[Tensor | None]:
    total = sum(oracles.total(output) for output in outputs)
    return list(torch.autograd.grad(total, of, allow_unused=True))


def assert_equals_the_loop(ens: Ensemble, models: list[nn.Module], inputs: Any) -> None:
    floating = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    outputs = tensors(ens(*(per_member(x) for x in inputs)))
    own = [[output[i] for output in outputs] for i in range(N)]
    expected = member_outputs(models, inputs)
    torch.testing.assert_close(own, expected)
    if not any(output.requires_grad for output in outputs):
        return
    names = [name for name, _ in models[0].named_parameters()]
    mine = gradients(own, [*floating, *(ens.members.get_parameter(name) for name in names)])
    theirs = gradients(
        expected, [*floating, *(m.get_parameter(name) for name in names for m in models)]
    )
    count = len(floating)
    for got, want in zip(mine[:count], theirs[:count], strict=True):
        torch.testing.assert_close(got, want)
    for k, got in enumerate(mine[count:]):
        want = theirs[count + N * k : count + N * (k + 1)]
        if all(part is None for part in want):
            assert got is None or not got.any(), names[k]
        else:
            want = [torch.zeros_like(got[0]) if part is None else part for part in want]
            torch.testing.assert_close(got, torch.stack(want), msg=lambda m, k=k: names[k] + m)


def is_in_list(ran: set[str], how: str) -> bool:
    if how == "that op member by member":
        return "member by member" in ran
    return "member by member" not in ran and bool(ran) == (how == "a rule of unisono")


def test_every_class_stands_in_one_list() -> None:
    public = {
        name
        for name, value in vars(nn).items()
        if isinstance(value, type) and issubclass(value, nn.Module)
    }
    listed = [name for entries in LISTS.values() for name in entries]
    assert sorted(listed) == sorted(public)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("case", "how"), RUN)
def test_class_equals_the_loop_and_runs_as_listed(case: Entry, how: str, training: bool) -> None:
    if case.random and training:
        pytest.skip("draws random numbers: see the test below")
    models, inputs = make(case, training)
    ens = Ensemble(models, strategy="fused")
    with watched() as ran:
        assert_equals_the_loop(ens, models, inputs)
    assert is_in_list(ran, how), ran
    with torch.no_grad(), watched() as ran:
        outputs = tensors(ens(*(per_member(x) for x in inputs)))
        expected = member_outputs(models, inputs)
    torch.testing.assert_close([[o[i] for o in outputs] for i in range(N)], expected)
    assert is_in_list(ran, how), ran


@pytest.mark.parametrize("randomness", ["different", "same"])
@pytest.mark.parametrize(
    ("case", "how"),
    [param for param in RUN if param.values[0].random and param.id != "SyncBatchNorm"],
)
def test_members_draw_random_numbers_as_asked(case: Entry, how: str, randomness: str) -> None:
    models, _ = make(case, training=True)
    ens = Ensemble(models, strategy="fused", randomness=randomness)
    x = torch.full((50, 4, *case.inputs()[0].shape[2:]), -2.0, dtype=torch.float64)
    with watched() as ran:
        outputs = ens(per_member(torch.stack([x] * N)))
    assert is_in_list(ran, how)
    assert outputs.shape[1:] == models[0](x).shape
    assert torch.equal(outputs[0], outputs[1]) == (randomness == "same")


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(c, id=name) for name, (_, c) in WHOLE_CALL.items()),
        pytest.param(entry(nn.BatchNorm1d, 4, momentum=None, x=(3, 4)), id="BatchNorm-cumulative"),
    ],
)
def test_what_cannot_run_at_once_runs_as_a_loop(case: Entry) -> None:
    models, inputs = make(case, training=True)
    fused = Ensemble(models, strategy="fused")
    with pytest.raises((RuntimeError, EnsembleWarning), match=r"at once|dynamic shape"):
        fused(*(per_member(x) for x in inputs))
    models, inputs = make(case, training=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EnsembleWarning)  # none where the loop is measured faster
        assert_equals_the_loop(Ensemble(models), models, inputs)


@pytest.mark.parametrize("name", [n for n, why in NO_FORWARD.items() if why.startswith("refused")])
def test_what_is_refused_is_refused(name: str) -> None:
    def make_model() -> nn.Module:
        if name == "DataParallel":
            return nn.DataParallel(nn.Linear(2, 2))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lazy modules are said to be under development
            sizes = () if "Norm" in name else (2,) if name == "LazyLinear" else (2, 3)
            return getattr(nn, name)(*sizes)

    with pytest.raises(UnsupportedModelError, match=r"shape yet|wrapped in"):
        Ensemble([make_model(), make_model()])


OTHER = re.compile(  # ops that a member's forward doesn't call on ordinary tensors
    r"sparse|quant|nested|jagged|mkldnn|cudnn|miopen|mps|triton|fbgemm|fp16|int4|int8|int_mm"
    r"|philox|nnpack|cslt|cs[rc]|bs[rc]|coo|smm$|hspmm|spsolve|spdiags|(row|col)_indices|dense"
    r"|_foreach|_fused_|_amp_|_test_|backward|_jvp|_copy$|_copy\.|resize|^set_?(\.|$)|detach|lift"
    r"|_batch_dim|_cast_|_pin_memory|_lazy_clone|^_functional|_foobar|sobol|overrideable|^data$"
    r"|thnn|slow_conv|conv_depthwise|flash_attention|_attention_forward|_attention_math_for"
    r"|_(scaled|grouped)_.*mm|_grouped_mm|_shape_as|_reshape|_dim_arange|rowwise|_copy_from"
    r"|int_repr|q_per_|qparams|_make_(per|dual)|hash_tensor|_fill_mem|_parallel|^_stack$"
    r"|_chunk_cat|^_mixed|^_wrapped|_convolution\.deprecated|conj|_neg_|_indices|^_?values"
    r"|batch_norm_(stats|elemt|gather|update)|_batch_norm_(no|with)|_functional$|^copy$|^fill"
    r"|^zero$|as_strided|requires_grad|column_stack|_coalesce|_cpu_fallback|_linear_prepack"
)


def test_the_list_of_ops_without_a_batching_rule_is_complete() -> None:
    """Every op that torch would loop over with a warning, or refuse, runs member by member."""
    keys = ("Batched", "BatchedDecomposition", "VmapMode", "DynamicLayerFrontMode")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = set()
    for name in torch._C._dispatch_get_all_op_names():
        op = name.removeprefix("aten::")
        if op == name or op in RULES or OTHER.search(op):
            continue
        if any(has_kernel(name, f"FuncTorch{key}") for key in keys):
            continue
        schema = torch._C._get_schema(*name.partition(".")[::2])
        written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
        is_view = any(a.alias_info and not a.alias_info.is_write for a in schema.arguments)
        is_in_place = op.partition(".")[0].endswith("_")
        returns = {str(r.type) for r in schema.returns}
        takes_tensors = any("Tensor" in str(a.type) for a in schema.arguments)
        if written and not (is_in_place and written == [schema.arguments[0].name]):
            continue
        if takes_tensors and not is_view and returns and returns <= {"Tensor", "Optional[Tensor]"}:
            missing.add(op)
    assert missing - BY_MEMBER == set()


def page() -> str:
    """docs/support.md."""
    rows = []
    for how, entries in LISTS.items():
        for name, value in entries.items():
            why = value if isinstance(value, str) else value[0] if isinstance(value, tuple) else ""
            rows.append(f"| `{name}` | {how} | {why} |")
    ops = "\n".join(f"- `{op}`" for op in sorted(RULES))
    return f"""# Supported layers

Every public class of `torch.nn` runs as a member. The table says how a call of it runs for all
members at once; `tests/test_support.py` runs each of them, compares it with the loop, watches which
way it took, and writes this page.

- **A rule of unisono**: an op for which there is a better formulation than PyTorch's, one pass for
  all members.
- **PyTorch's batching rules**: what `torch.vmap` does.
- **That op member by member**: PyTorch has no batching rule for it. The rest of the model still
  runs at once.
- **The loop, after a warning**: it can't run for all members at once. `strategy="auto"` runs it for
  one member after another, and says so once unless that is what it had chosen anyway.

On a CPU, `LSTM`, `GRU` and `RNN` take each step for all members at once where many are small.
Others run one after another as PyTorch runs them ([why](design-notes.md#recurrent-layers)).

Classes of other packages, and your own, run by the ops that they call. Some options change the way:
`Embedding(max_norm=...)` and `EmbeddingBag(padding_idx=...)` run member by member, and
`BatchNorm(momentum=None)` counts its batches in a tensor, which needs the loop in training.

| class | runs by | |
|---|---|---|
{chr(10).join(sorted(rows, key=str.lower))}

## Ops with a rule

A rule is for the op, not for the class: it holds for `nn.Linear`, for a subclass of it and for
`F.linear` in your own `forward`.

{ops}
"""


def test_the_page_says_what_was_tested() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python tests/test_support.py`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
