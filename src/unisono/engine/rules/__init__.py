"""The table of rules: ops that run better than through torch's own batching rule.

Each row names the op, the function that runs it for all members on plain tensors, and how many
of its leading arguments are tensors. A rule is exact wherever it returns a result; where it
returns None the op goes the way it would have gone without us.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from unisono.engine.axis import Rule
from unisono.engine.rules.attention import attention
from unisono.engine.rules.conv import conv
from unisono.engine.rules.embedding import embedding
from unisono.engine.rules.linear import linear
from unisono.engine.rules.loss import cross_entropy, nll
from unisono.engine.rules.norm import batch_norm
from unisono.engine.rules.pooling import POOLING, pooling

RULES: Final[Mapping[str, tuple[Rule, int]]] = {
    "linear": (linear, 3),
    "conv1d": (conv, 3),
    "conv2d": (conv, 3),
    "conv3d": (conv, 3),
    "conv1d.padding": (conv, 3),
    "conv2d.padding": (conv, 3),
    "conv3d.padding": (conv, 3),
    "batch_norm": (batch_norm, 5),
    "embedding": (embedding, 2),
    "cross_entropy_loss": (cross_entropy, 3),
    "nll_loss_nd": (nll, 3),
    "scaled_dot_product_attention": (attention, 4),
    **{op: (pooling(op), 1) for op in POOLING},
}

# Ops for which torch has no batching rule, nor we a better idea: they run for one member after
# another, and only they. On a CPU that is also the fastest way to run an LSTM.
BY_MEMBER: Final[Sequence[str]] = (
    "lstm.input",
    "lstm.data",
    "gru.input",
    "gru.data",
    "rnn_tanh.input",
    "rnn_tanh.data",
    "rnn_relu.input",
    "rnn_relu.data",
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
    "_weight_norm",
    "bilinear",
    "embedding_bag.padding_idx",
    "_native_multi_head_attention",
    "_transformer_encoder_layer_fwd",
)
