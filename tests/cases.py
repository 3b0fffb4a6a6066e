"""The table of models on which every property of an ensemble is tested."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unisono.engine.rules.reduced_loss import REDUCED_LOSSES
from unisono.engine.rules.spatial import POOLING, UPSAMPLING

N = 3
B = 4


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and what is known of it."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    rules: frozenset[str] = field(default_factory=frozenset)  # rules that fused has to use
    dtype: torch.dtype = torch.float64
    random_in_training: bool = False
    wrong_gradient_under_vmap: str = ""  # why torch.vmap itself is wrong for per-member inputs
    refused_by_vmap: str = ""  # why torch.vmap raises


def floats(*shape: int, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Callable[[], Any]:
    """Inputs: one tensor, and keyword arguments as they are."""
    return lambda: ((torch.randn(*shape, dtype=dtype),), kwargs)


def ids(*shape: int, high: int) -> Callable[[], Any]:
    """Inputs: one tensor of integers below ``high``."""
    return lambda: ((torch.randint(high, shape),), {})


class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed; two names hold one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))


class TwoPaths(nn.Module):
    """One submodule reachable by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.blocks = nn.ModuleList([self.first, nn.Linear(5, 5)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        return self.first(x)


class PartlyFrozen(nn.Module):
    """The trunk does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(5, 7).requires_grad_(False)
        self.head = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.trunk(x)))


class WithKeywords(nn.Module):
    """Tensors and numbers by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor, *, scale: Tensor | None = None, power: int = 1) -> Tensor:
        y = self.linear(x) ** power
        return y if scale is None else y * scale


@dataclass
class Prediction:
    """A dataclass that torch's pytree doesn't know."""

    mean: Tensor
    extras: dict[str, Any]


Pair = namedtuple("Pair", ["left", "right"])


class NestedOutputs(nn.Module):
    """Dict, dataclass, named tuple, list, None and numbers in one output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        y = self.linear(batch["x"]) + batch["shift"][0]
        return {
            "prediction": Prediction(y, {"rows": y.shape[0], "hidden": None}),
            "pair": Pair(y.sum(), [y[:, :2], "text"]),
            "constant": torch.ones(2, dtype=y.dtype),
        }


class LoopOverShape(nn.Module):
    """A Python loop over the length of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(3 + 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            h = torch.tanh(self.cell(torch.cat([x[:, t], h], dim=-1)))
        return h


class RunningMean(nn.Module):
    """Re-assigns one buffer and writes another in place, in training."""

    mean: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
            self.count.add_(1)
        return y - self.mean


class KeepsState(nn.Module):
    """Keeps a hidden state and a counter in plain attributes, as recurrent policies do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.hidden: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if self.hidden is not None:
            h = h + self.hidden
        self.hidden = h.detach().tanh()
        self.calls += 1
        return h * self.calls


class SharedWeightLinear(nn.Module):
    """Linear with a weight that is computed, so it is not one of the member's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(5, 2))
        self.other = nn.Parameter(torch.randn(2, 5))
        self.bias = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        constant = torch.eye(5, dtype=x.dtype)
        y = F.linear(x, self.factor @ self.other, self.bias)
        return F.linear(F.linear(y, constant), constant, self.bias)


class ComplexLinear(nn.Module):
    """Complex parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 5, dtype=torch.complex128))
        self.bias = nn.Parameter(torch.randn(4, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias).abs()


class Attention(nn.Module):
    """Attention with every kind of mask, and with fewer heads for keys than for queries."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mask = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y, weights = self.attention(x, x, x)  # (B, 5, 8), (B, 5, 5)
        padded = torch.zeros(x.shape[:2], dtype=torch.bool)
        padded[:, -1] = True
        heads = y.unflatten(-1, (4, 2)).transpose(1, 2)  # (B, 4, 5, 2)
        attend = F.scaled_dot_product_attention
        return {
            "weights": weights,
            "padding": self.attention(x, x, x, key_padding_mask=padded, need_weights=False)[0],
            "causal": attend(heads, heads, heads, is_causal=True, scale=0.3),
            "grouped": attend(heads, heads[:, :2], heads[:, :2], enable_gqa=True),
            "own mask": attend(heads, heads, heads, self.mask),
            "one mask": attend(heads, x[:, None, :, :2], heads[:, :1], torch.ones(5, 5).tril() > 0),
            "batch of masks": attend(heads, heads, heads, x[:, None, :, :5]),
            "3d": attend(y, y, x),
            "2d": attend(y[0], y[0], y[0], self.mask.sigmoid() > 0.1),
            "5d": attend(heads[None], heads[None], heads[None], self.mask),
        }


class NativeAttention(nn.Module):
    """Takes torch's native path in eval mode, where no gradient is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.layer(x)
        z, weights = self.attention(y, y, y)
        return y, z, weights, self.attention(y, y, y, need_weights=False)[0]


class Recurrent(nn.Module):
    """Every recurrent layer and cell, and a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(8, 4, batch_first=True)
        self.tanh = nn.RNN(4, 4, batch_first=True)
        self.relu = nn.RNN(4, 4, nonlinearity="relu", batch_first=True)
        self.cells = nn.ModuleList(
            [
                nn.LSTMCell(4, 4),
                nn.GRUCell(4, 4),
                nn.RNNCell(4, 4),
                nn.RNNCell(4, 4, nonlinearity="relu"),
            ]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, (h, c) = self.lstm(x)
        y, _ = self.gru(y)
        y, _ = self.relu(self.tanh(y)[0])
        state, memory = self.cells[0](y[:, -1])
        for cell in self.cells[1:]:
            state = cell(y[:, 0], state)
        return y, h, c, state, memory


class Packed(nn.Module):
    """Recurrent layers on a packed sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.LSTM(3, 4), nn.GRU(3, 4), nn.RNN(3, 4), nn.RNN(3, 4, nonlinearity="relu")]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        lengths = torch.tensor([5, 4, 2])
        batch_sizes = torch.tensor([(lengths > t).sum() for t in range(5)])
        packed = torch.cat([x[t, :size] for t, size in enumerate(batch_sizes.tolist())])
        sequence = nn.utils.rnn.PackedSequence(packed, batch_sizes)
        return [layer(sequence)[0].data for layer in self.layers]


class Pools(nn.Module):
    """Every pooling in every number of dimensions, of the input and of a convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(2, 3, 3), nn.Conv2d(2, 3, 3), nn.Conv3d(2, 3, 3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        pools = [
            [F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d],
            [F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d],
            [F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d],
        ]
        outputs = []
        for d, conv in enumerate(self.convs):
            image = x[(..., *[0] * (2 - d))]  # (B, 2, 8), (B, 2, 8, 8), (B, 2, 8, 8, 8)
            for pool in pools[d]:
                outputs += [pool(conv(image), 2), pool(image * conv.bias[:2].sum(), 2)]
                outputs += [pool(conv(image)[0], 3)]  # without a batch
        return [*outputs, F.max_pool2d(outputs[0], 2, 1, 1, 1, True)]


class CrossEntropy(nn.Module):
    """Returns losses with every kind of target, as ``ens.run`` does with a loss function."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        y = self.linear(x)  # (B, 4) -> (B, 5)
        weight = torch.linspace(0.5, 2.0, 5, dtype=x.dtype)
        pixels = torch.stack([y, -y], dim=-1)  # (B, 5, 2)
        return {
            "mean": F.cross_entropy(y, target),
            "ignored": F.cross_entropy(y, target, weight, ignore_index=1),
            "sum": F.cross_entropy(y, target, reduction="sum", label_smoothing=0.1),
            "none": F.cross_entropy(
                pixels, torch.stack([target, 1 - target], -1), reduction="none"
            ),
            "probabilities": F.cross_entropy(y, y.detach().exp().softmax(-1), label_smoothing=0.1),
            "one": F.cross_entropy(y[0], target[0]),
            "nll": F.nll_loss(y.log_softmax(-1), target, weight),
            "nll-none": F.nll_loss(pixels.log_softmax(1), torch.stack([target] * 2, -1)),
        }


class RarePools(nn.Module):
    """Pooling by power, at random places, and undone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.register_buffer("places", torch.rand(B, 3, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.conv(x)  # (B, 2, 8, 8) -> (B, 3, 8, 8)
        largest, where = F.adaptive_max_pool2d(y, 3, return_indices=True)
        pooled, places = F.max_pool2d(y, 2, return_indices=True)
        fractional = F.fractional_max_pool2d(y, 2, 3, _random_samples=self.places.clamp(0, 0.99))
        return [
            *(largest, where, fractional, F.max_unpool2d(pooled, places, 2)),
            *(F.lp_pool2d(y.abs(), 3.0, 2), F.lp_pool1d(y[:, :, 0].abs(), 2.0, 2)),
        ]


class Losses(nn.Module):
    """Every loss of single elements or examples, with every reduction."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, labels: Tensor) -> list[Tensor]:
        y = self.linear(x)  # (B, 3)
        other, target = y.flip(0) * 0.5, x.detach().sigmoid()
        weight = torch.linspace(0.5, 2.0, 3, dtype=x.dtype)
        losses = []
        for reduction in ("mean", "sum", "none"):
            how = {"reduction": reduction}
            losses += [
                F.binary_cross_entropy(y.sigmoid(), target, **how),
                F.binary_cross_entropy(y.sigmoid(), target, weight, **how),
                F.binary_cross_entropy_with_logits(y, target, pos_weight=weight, **how),
                F.binary_cross_entropy_with_logits(y[0], target[0], target[1], **how),
                F.kl_div(
                    y.log_softmax(-1),
                    target.softmax(-1),
                    reduction=reduction.replace("mean", "batchmean"),
                ),
                F.kl_div(
                    y.log_softmax(-1), other.log_softmax(-1), reduction="sum", log_target=True
                ),
                F.margin_ranking_loss(y, other, 1.0 - 2.0 * (target > 0.5), 0.1, **how),
                F.triplet_margin_loss(y, other, x, swap=True, **how),
                F.soft_margin_loss(y, 1.0 - 2.0 * (target > 0.5), **how),
                F.multi_margin_loss(y, labels, **how),
                F.multi_margin_loss(y, labels, p=2, weight=weight, **how),
                F.multi_margin_loss(y[0], labels[0], **how),
                F.multilabel_margin_loss(y, labels[:, None].expand(-1, 3), **how),
            ]
        steps = y.expand(6, *y.shape).log_softmax(-1)  # (T, B, 3)
        lengths = torch.full((len(x),), 6), torch.full((len(x),), 1)
        losses += [F.ctc_loss(steps, 1 + labels[:, None].clamp(max=1), *lengths)]
        return losses


class ConvTransposes(nn.Module):
    """Transposed convolutions in a chain, grouped, dilated, and without a batch."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        self.first = nn.ModuleList([kind(2, 4, 3, 2, output_padding=1) for kind in kinds])
        self.then = nn.ModuleList(
            [kind(4, 6, 2, padding=1, groups=2, bias=False, dilation=2) for kind in kinds]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for d in range(3):
            image = x[(..., *[0] * (2 - d))]  # (B, 2, 2), (B, 2, 2, 2), (B, 2, 2, 2, 2)
            y = self.first[d](image)
            outputs += [self.then[d](y.relu()), self.then[d](torch.cat([image, image], 1))]
            outputs += [self.first[d](image[0])]
        constant = torch.ones(2, 3, 2, dtype=x.dtype)
        return [*outputs, F.conv_transpose1d(x[..., 0, 0], constant)]


class Norms(nn.Module):
    """Normalisation over axes, channels and groups, behind a convolution and on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.over_axes = nn.ModuleList(
            [
                nn.LayerNorm(5),
                nn.LayerNorm((4, 5), bias=False),
                nn.LayerNorm(5, elementwise_affine=False),
                nn.RMSNorm(5, eps=1e-3),
                nn.RMSNorm(5, elementwise_affine=False),
            ]
        )
        self.over_channels = nn.ModuleList(
            [
                nn.GroupNorm(2, 4),
                nn.GroupNorm(4, 4, affine=False),
                nn.InstanceNorm1d(4),
                nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        inputs = (x, self.conv(x))  # (B, 4, 5)
        return [norm(y) for norm in (*self.over_axes, *self.over_channels) for y in inputs]


class Bags(nn.Module):
    """Bags of embeddings in one and two dimensions, weighted, empty, and of one table."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList([nn.EmbeddingBag(7, 3, mode=m) for m in ("sum", "mean", "max")])
        self.padded = nn.EmbeddingBag(7, 3, padding_idx=0, include_last_offset=True)
        self.by_frequency = nn.EmbeddingBag(7, 3, scale_grad_by_freq=True, mode="sum")
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, ids: Tensor) -> list[Tensor]:
        flat, offsets = ids.flatten(), torch.tensor([0, 2, 2, 5])  # (B, 2)
        outputs = [y for bag in self.bags for y in (bag(ids), bag(flat, offsets))]
        table = torch.linspace(-1, 1, 21, dtype=self.scale.dtype).view(7, 3)
        outputs += [self.bags[0](ids, per_sample_weights=self.scale.view(4, 2))]
        outputs += [
            F.embedding_bag(flat, table, offsets, per_sample_weights=self.scale, mode="sum")
        ]
        outputs += list(torch.embedding_bag(self.bags[2].weight, flat, offsets, mode=2))
        outputs += [self.padded(flat, torch.tensor([0, 3, 8])), self.by_frequency(ids)]
        return outputs


class Resized(nn.Module):
    """Every upsampling, padding and joining, of the input and of a convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        modes = [("linear",), ("bilinear", "bicubic"), ("trilinear",)]
        outputs = []
        for d, conv in enumerate(self.convs):
            image = x[(..., *[0] * (2 - d))]  # (B, 2, 3), (B, 2, 3, 3), (B, 2, 3, 3, 3)
            y = conv(image)
            for mode in ("nearest", "nearest-exact", *modes[d]):
                outputs += [F.interpolate(y, scale_factor=1.5, mode=mode)]
                outputs += [F.interpolate(image * conv.bias[0], 4, mode=mode)]
            for mode in ("constant", "reflect", "replicate", "circular"):
                around = (1, 2) * (d + 1)
                outputs += [F.pad(y, around, mode), F.pad(y[0], around, mode)]
                outputs += [F.pad(image * conv.bias[0], around, mode)]
            outputs += [torch.cat([y, image, conv(y)], k) for k in (0, 1, -1)]
        image = self.convs[1](x[..., 0])
        for mode in ("bilinear", "bicubic"):
            outputs += [F.interpolate(image, 2, mode=mode, antialias=True)]
        return [*outputs, F.pad(y, (1, 0) * 5, value=2.0), torch.cat([image, image])]


class Reordered(nn.Module):
    """Ops that only move numbers, and ops that write into a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.unfold = nn.Unfold(2)

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.conv(x)  # (B, 4, 4, 4)
        written = y.clone().clamp_(-1, 1)
        written.masked_fill_(x > 1, y.sum()).tril_()
        written.addcmul_(x, y).pow_(2)
        patches = self.unfold(y)
        return [
            *(F.pixel_shuffle(y, 2), F.pixel_unshuffle(y, 2), F.channel_shuffle(y, 2)),
            *(patches, F.fold(patches, (4, 4), 2), written),
        ]


class DroppedAttention(nn.Module):
    """Attention that drops weights in training; in eval mode it drops them not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x).unflatten(-1, (2, 2)).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y, dropout_p=0.5 * self.training)


class MaskedAttention(nn.Module):
    """Multi-head attention and a layer of a Transformer with masks, also the native ones."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.sequence_first = nn.MultiheadAttention(8, 2, bias=False, kdim=4, vdim=4)
        self.added = nn.MultiheadAttention(8, 2, add_bias_kv=True, add_zero_attn=True)
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> list[Tensor | None]:
        causal = torch.ones(5, 5).triu(1) > 0
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[0, 3:] = True
        attend = self.attention
        results = [
            attend(x, x, x, key_padding_mask=padding, need_weights=False),
            attend(x, x, x, attn_mask=causal, average_attn_weights=False),
            attend(x, x, x, attn_mask=causal, key_padding_mask=padding),
            attend(x[:, :2], x, x),
            self.sequence_first(x, x[..., :4], x[..., 4:]),
            self.added(x, x, x),
        ]
        layers = [
            self.layer(x, src_mask=causal),
            self.layer(x, src_key_padding_mask=padding),
            self.layer(x, causal, padding),
        ]
        return [*(part for result in results for part in result), *layers]


class RecurrentOptions(nn.Module):
    """Recurrent layers with a projection, without bias, and with states given."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2, bias=False, proj_size=2)
        self.gru = nn.GRU(2, 3, 2, bidirectional=True)
        self.start = nn.Parameter(torch.randn(4, 1, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, _ = self.lstm(x)
        z, h = self.gru(y, self.start.expand(-1, x.shape[1], -1).contiguous())
        return y, z, h, self.gru(y[:, 0])[0]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def _cnn(**norm: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4, **norm),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6, **norm),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def _half(dtype: torch.dtype) -> Case:
    return Case(
        lambda: _mlp().to(dtype), floats(B, 5, dtype=dtype), frozenset({"linear"}), dtype=dtype
    )


_LINEAR = frozenset({"linear"})
_CONV2D = frozenset({"conv2d"})
_BATCH_NORM = frozenset({"batch_norm"})

_CASES: dict[str, Case] = {
    "mlp": Case(_mlp, floats(B, 5), _LINEAR),
    "linear-without-bias": Case(lambda: nn.Linear(5, 3, bias=False), floats(B, 5), _LINEAR),
    "linear-without-batch": Case(lambda: nn.Linear(5, 3), floats(5), _LINEAR),
    "linear-4d": Case(lambda: nn.Linear(5, 3), floats(2, B, 3, 5), _LINEAR),
    "linear-empty-batch": Case(lambda: nn.Linear(5, 3), floats(0, 5), _LINEAR),
    "linear-computed-weight": Case(SharedWeightLinear, floats(B, 5), _LINEAR),
    "cnn-batchnorm": Case(_cnn, floats(B, 2, 8, 8), _CONV2D | _BATCH_NORM | _LINEAR),
    "cnn-batchnorm-without-tracking": Case(
        lambda: _cnn(track_running_stats=False), floats(B, 2, 8, 8), _CONV2D | _BATCH_NORM
    ),
    "cnn-batchnorm-without-affine": Case(
        lambda: _cnn(affine=False), floats(B, 2, 8, 8), _CONV2D | _BATCH_NORM
    ),
    "batchnorm1d": Case(lambda: nn.BatchNorm1d(5), floats(B, 5), _BATCH_NORM),
    "batchnorm1d-length": Case(lambda: nn.BatchNorm1d(5), floats(B, 5, 6), _BATCH_NORM),
    "batchnorm-mlp": Case(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)),
        floats(B, 5),
        _LINEAR | _BATCH_NORM,
    ),
    "conv-grouped": Case(
        lambda: nn.Conv2d(4, 6, 3, groups=2, stride=2), floats(B, 4, 7, 7), _CONV2D
    ),
    "conv-depthwise": Case(
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8)),
        floats(B, 4, 7, 7),
        _CONV2D,
    ),
    "conv-dilated": Case(lambda: nn.Conv2d(2, 3, 3, dilation=2), floats(B, 2, 8, 8), _CONV2D),
    "conv-circular": Case(
        lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        floats(B, 2, 6, 6),
        _CONV2D,
    ),
    "conv-same-padding": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, (3, 1), padding="same"),
            nn.Flatten(2),
            nn.Conv1d(3, 2, 3, padding="valid"),
            nn.Unflatten(2, (2, 2, 7)),
            nn.Conv3d(2, 2, 1, padding="same"),
        ),
        floats(B, 2, 5, 6),
        frozenset({"conv2d.padding", "conv1d.padding", "conv3d.padding"}),
    ),
    "conv-without-batch": Case(lambda: nn.Conv2d(2, 3, 3), floats(2, 6, 6)),
    "conv1d": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3, stride=2)),
        floats(B, 3, 12),
        frozenset({"conv1d"}),
    ),
    "conv3d": Case(
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)),
        floats(B, 2, 4, 4, 4),
        frozenset({"conv3d", "batch_norm"}),
    ),
    "dropout": Case(
        lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 2)),
        floats(B, 5),
        _LINEAR,
        random_in_training=True,
    ),
    "layernorm": Case(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
        floats(B, 5),
        _LINEAR,
    ),
    "groupnorm": Case(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), floats(B, 2, 6, 6), _CONV2D
    ),
    "embedding-padding-index": Case(
        lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 2)),
        ids(B, 3, high=7),
        _LINEAR | {"embedding"},
        wrong_gradient_under_vmap="torch's batching rule of embedding drops padding_idx",
    ),
    "embedding-gradient-by-frequency": Case(
        lambda: nn.Embedding(4, 3, scale_grad_by_freq=True),
        ids(B, 3, high=4),
        frozenset({"embedding"}),
    ),
    "prelu": Case(lambda: nn.Sequential(nn.Linear(5, 6), nn.PReLU(6)), floats(B, 5), _LINEAR),
    "tied": Case(TiedAutoencoder, floats(B, 6), _LINEAR),
    "two-paths": Case(TwoPaths, floats(B, 5), _LINEAR),
    "frozen": Case(PartlyFrozen, floats(B, 5), _LINEAR),
    "keywords": Case(
        WithKeywords,
        lambda: (
            (torch.randn(B, 5, dtype=torch.float64),),
            {"scale": torch.randn(5, dtype=torch.float64), "power": 2},
        ),
        _LINEAR,
    ),
    "nested-outputs": Case(
        NestedOutputs,
        lambda: (
            (
                {
                    "x": torch.randn(B, 5, dtype=torch.float64),
                    "shift": (torch.randn(4, dtype=torch.float64), None),
                },
            ),
            {},
        ),
        _LINEAR,
    ),
    "loop-over-shape": Case(LoopOverShape, floats(B, 5, 3), _LINEAR),
    "reassigned-buffer": Case(RunningMean, floats(B, 3), _LINEAR),
    "plain-attributes": Case(KeepsState, floats(B, 3), _LINEAR),
    "float16": _half(torch.float16),
    "bfloat16": _half(torch.bfloat16),
    "complex": Case(
        ComplexLinear,
        floats(B, 5, dtype=torch.complex128),
        _LINEAR,
        dtype=torch.complex128,
    ),
    "cross-entropy": Case(
        CrossEntropy,
        lambda: ((torch.randn(B, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 0])), {}),
        _LINEAR | {"cross_entropy_loss", "nll_loss_nd"},
    ),
    "pooling": Case(
        Pools,
        floats(B, 2, 8, 8, 8),
        frozenset({"conv1d", "conv2d", "conv3d", *POOLING}),
    ),
    "pooling-large": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 20, 3), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1)),
            *(nn.AdaptiveAvgPool2d(2), nn.Conv2d(20, 2, 2)),
        ),
        floats(B, 2, 34, 34),
        _CONV2D | {"max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"},
    ),
    "conv-large": Case(
        lambda: nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.BatchNorm2d(32)),
        floats(B, 8, 32, 32),
        _CONV2D | _BATCH_NORM,
    ),
    "conv1d-large-without-bias": Case(
        lambda: nn.Conv1d(32, 64, 5, stride=2, bias=False),
        floats(B, 32, 640),
        frozenset({"conv1d"}),
    ),
    "attention": Case(
        Attention,
        floats(B, 5, 8),
        _LINEAR | {"scaled_dot_product_attention"},
        refused_by_vmap="torch's fallback can't differentiate attn_mask",
    ),
    "transformer": Case(
        lambda: nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True),
        lambda: (
            (
                torch.randn(B, 5, 8, dtype=torch.float64),
                torch.randn(B, 3, 8, dtype=torch.float64),
            ),
            {},
        ),
        _LINEAR | {"scaled_dot_product_attention"},
    ),
    "native-attention": Case(
        NativeAttention,
        floats(B, 5, 8),
        frozenset({"_native_multi_head_attention", "_transformer_encoder_layer_fwd"}),
    ),
    "recurrent": Case(
        Recurrent,
        floats(B, 5, 3),
        frozenset(
            {
                "lstm.input",
                "gru.input",
                "rnn_tanh.input",
                "rnn_relu.input",
                "lstm_cell",
                "gru_cell",
                "rnn_tanh_cell",
                "rnn_relu_cell",
            }
        ),
        refused_by_vmap="no batching rule for aten::lstm.input",
    ),
    "recurrent-packed": Case(
        Packed,
        floats(5, 3, 3),
        frozenset({"lstm.data", "gru.data", "rnn_tanh.data", "rnn_relu.data"}),
        refused_by_vmap="no batching rule for aten::lstm.data",
    ),
    "weight-norm": Case(
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 3)),
        floats(B, 5),
        _LINEAR | {"_weight_norm"},
    ),
    "bilinear": Case(
        lambda: nn.Bilinear(5, 5, 3),
        lambda: (tuple(torch.randn(2, B, 5, dtype=torch.float64)), {}),
        frozenset({"bilinear"}),
    ),
    "embedding-bag": Case(
        Bags,
        ids(B, 2, high=7),
        frozenset({"embedding_bag", "embedding_bag.padding_idx"}),
    ),
    "conv-transpose": Case(
        ConvTransposes,
        floats(B, 2, 2, 2, 2),
        frozenset({"conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input"}),
    ),
    "norms": Case(
        Norms,
        floats(B, 4, 5),
        frozenset({"layer_norm", "rms_norm", "group_norm", "instance_norm"}),
    ),
    "losses": Case(
        Losses,
        lambda: ((torch.randn(B, 3, dtype=torch.float64), torch.randint(3, (B,))), {}),
        frozenset(REDUCED_LOSSES),
    ),
    "resized": Case(
        Resized,
        floats(2, 2, 3, 3, 3),
        frozenset({"pad", "cat", *UPSAMPLING}),
    ),
    "pooling-rare": Case(
        RarePools,
        floats(B, 2, 8, 8),
        frozenset({"adaptive_max_pool2d", "fractional_max_pool2d", "max_unpool2d"}),
    ),
    "reordered": Case(Reordered, floats(B, 4, 4, 4), _CONV2D),
    "attention-dropped": Case(
        DroppedAttention,
        floats(B, 5, 4),
        frozenset({"scaled_dot_product_attention"}),
        random_in_training=True,
    ),
    "attention-masked": Case(
        MaskedAttention,
        floats(B, 5, 8),
        frozenset({"_native_multi_head_attention", "_transformer_encoder_layer_fwd"}),
    ),
    "recurrent-options": Case(
        RecurrentOptions,
        floats(5, 2, 3),
        frozenset({"lstm.input", "gru.input"}),
        refused_by_vmap="no batching rule for aten::lstm.input",
    ),
    "without-parameters": Case(lambda: nn.Sequential(nn.Tanh(), nn.Flatten()), floats(B, 2, 3)),
}

CASES = [pytest.param(case, id=name) for name, case in _CASES.items()]


def members(case: Case, n: int = N) -> list[nn.Module]:
    """N models with values of their own everywhere, also where torch starts with 0 or 1."""
    models = [case.make() for _ in range(n)]
    for model in models:
        if case.dtype == torch.float64:
            model.double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            for name, buffer in model.named_buffers():
                if buffer.is_floating_point():
                    noise = torch.rand_like(buffer)
                    buffer.copy_(noise + 0.5 if name.endswith("var") else buffer + noise)
    return models
