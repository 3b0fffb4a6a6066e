"""The table of rules: ops that run better than through torch's own batching rule.

Each row names the op, the function that runs it for all members on plain tensors, and how many
of its first arguments may be tensors. A rule is exact wherever it returns a result; where it
returns None the op goes the way it would have gone without us.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from unisono.engine.axis import Rule
from unisono.engine.rules.attention import attention
from unisono.engine.rules.by_member import BY_MEMBER as BY_MEMBER
from unisono.engine.rules.conv import conv
from unisono.engine.rules.conv_transpose import conv_transpose
from unisono.engine.rules.embedding import embedding
from unisono.engine.rules.embedding_bag import embedding_bag
from unisono.engine.rules.layer_norm import layer_norm, rms_norm
from unisono.engine.rules.linear import linear
from unisono.engine.rules.loss import cross_entropy, nll
from unisono.engine.rules.native_attention import encoder_layer, native_attention
from unisono.engine.rules.norm import batch_norm, group_norm, instance_norm
from unisono.engine.rules.recurrent import RECURRENT, recurrent
from unisono.engine.rules.reduced_loss import REDUCED_LOSSES, reduced_loss
from unisono.engine.rules.spatial import POOLING, UPSAMPLING, cat, pad, spatial

RULES: Final[Mapping[str, tuple[Rule, int]]] = {
    "linear": (linear, 3),
    "conv1d": (conv, 3),
    "conv2d": (conv, 3),
    "conv3d": (conv, 3),
    "conv1d.padding": (conv, 3),
    "conv2d.padding": (conv, 3),
    "conv3d.padding": (conv, 3),
    "conv_transpose1d": (conv_transpose, 3),
    "conv_transpose2d.input": (conv_transpose, 3),
    "conv_transpose3d.input": (conv_transpose, 3),
    "batch_norm": (batch_norm, 5),
    "instance_norm": (instance_norm, 5),
    "group_norm": (group_norm, 4),
    "layer_norm": (layer_norm, 4),
    "rms_norm": (rms_norm, 3),
    "embedding": (embedding, 2),
    "embedding_bag": (embedding_bag, 7),
    "embedding_bag.padding_idx": (embedding_bag, 7),
    "cross_entropy_loss": (cross_entropy, 3),
    "nll_loss_nd": (nll, 3),
    "scaled_dot_product_attention": (attention, 4),
    "_native_multi_head_attention": (native_attention, 10),
    "_transformer_encoder_layer_fwd": (encoder_layer, 19),
    **{op: (reduced_loss(op), max(5, count)) for op, count in REDUCED_LOSSES.items()},
    **{op: (spatial(op), 1) for op in (*POOLING, *UPSAMPLING)},
    **{op: (recurrent(op), 3) for op in RECURRENT},
    "pad": (pad, 1),
    "cat": (cat, 1),
}
